"""One step of a build in a process of its own: what crashes, hangs or eats memory there is one failed row.

    facts = in_child(write_ir, timeout=600, what="the OpenVINO conversion")(request)

The step is a module-level function whose arguments and result are what JSON and dataclasses can hold. Its
module imports torch only where the SDK needs it (Core ML's does), so that a child costs only its own SDK.
Arguments go in by stdin, which then stays open: a child whose parent was killed sees it close and ends. What
a library prints goes to a file, of which the last line is quoted when the child dies.
"""

from __future__ import annotations

import importlib
import inspect
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast, get_type_hints

import msgspec

from vit_export import errors
from vit_export.errors import MissingExtra, TargetError, VitExportError
from vit_export.python310 import module_command

P = ParamSpec("P")
R = TypeVar("R")


class Failure(msgspec.Struct, frozen=True):
    """An error of vit_export.errors named `kind`; extra: for MissingExtra."""

    kind: str
    message: str
    hint: str = ""
    package: str = ""
    extra: str = ""


class Reply(msgspec.Struct, frozen=True):
    """What the child writes: a value, or why there is none."""

    value: msgspec.Raw = msgspec.Raw(b"null")
    failure: Failure | None = None


def in_child(step: Callable[P, R], *, timeout: float, what: str) -> Callable[P, R]:
    """`step`, run in a child. what: its name in messages. timeout: seconds until it is killed.

    Raises what the step raises of vit_export.errors, and TargetError when the child dies, hangs or raises
    anything else.
    """

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = inspect.signature(step).bind(*args, **kwargs).arguments
        line = msgspec.json.encode(bound, enc_hook=_encode) + b"\n"
        with tempfile.TemporaryDirectory(prefix="vit-export-") as folder:
            reply = _run(f"{step.__module__}:{step.__qualname__}", line, Path(folder), timeout, what)
        if reply.failure is not None:
            raise _error(reply.failure)
        result = get_type_hints(step)["return"]
        return cast(R, msgspec.json.decode(reply.value, type=result, dec_hook=_decode))

    return call


def _run(name: str, line: bytes, folder: Path, timeout: float, what: str) -> Reply:
    said, answer = folder / "said.txt", folder / "reply.json"
    with said.open("wb") as log:
        process = subprocess.Popen(
            module_command("vit_export.export.child", name, str(answer)),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is the parent's to handle, and one kill ends all
        )
    assert process.stdin is not None
    try:
        with suppress(BrokenPipeError):  # it died at once; its exit code says so below
            process.stdin.write(line)
            process.stdin.flush()
        code = process.wait(timeout)
    except subprocess.TimeoutExpired:
        raise TargetError(f"{what} did not end within {timeout:g} s", "give it more with --timeout") from None
    finally:
        _kill(process)
        with suppress(OSError):
            process.stdin.close()
    if code == 0 and answer.exists():
        return msgspec.json.decode(answer.read_bytes(), type=Reply)
    raise TargetError(f"{what} {_death(code)}", _last_words(said))


def _death(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    memory = " (the system does that when memory runs out)" if name == "SIGKILL" else ""
    return f"died with {name}{memory}"


def _last_words(said: Path) -> str:
    lines = [line.strip() for line in said.read_text(errors="replace").splitlines() if line.strip()]
    return f"last words: {lines[-1][:300]}" if lines else ""


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the child and what it started: a vendor's own helper (OpenVINO forks one) may outlive its work."""
    if sys.platform == "win32":
        if process.poll() is None:
            process.kill()
    else:
        with suppress(ProcessLookupError):  # nobody of its session is left
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _error(failure: Failure) -> VitExportError:
    if failure.extra:
        return MissingExtra(failure.package, failure.extra)
    kind = getattr(errors, failure.kind, TargetError)
    error = cast(VitExportError, kind.__new__(kind))
    VitExportError.__init__(error, failure.message, failure.hint)
    return error


def _encode(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a step cannot take or give a {type(value).__name__}")


def _decode(kind: type, value: Any) -> Any:
    if issubclass(kind, Path):
        return Path(value)
    raise TypeError(f"a step cannot take a {kind.__name__}")


def main() -> None:
    """The child: read the arguments, do the step, write the reply."""
    name, answer = sys.argv[1], Path(sys.argv[2])
    line = sys.stdin.buffer.readline()
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    reply = _reply(name, line)
    part = answer.with_suffix(".part")
    part.write_bytes(msgspec.json.encode(reply, enc_hook=_encode))
    part.replace(answer)
    sys.stdout.flush()
    os._exit(0)  # a library that hangs or crashes while it is unloaded has done its work


def _end_with_the_parent() -> None:
    sys.stdin.buffer.read()  # returns when the other end is closed
    if sys.platform != "win32":
        os.killpg(0, signal.SIGKILL)  # with what the library started: we lead our own session
    os._exit(1)


def _reply(name: str, line: bytes) -> Reply:
    module, _, function = name.partition(":")
    try:
        step = getattr(importlib.import_module(module), function)
        hints = get_type_hints(step)
        given = msgspec.json.decode(line, type=dict[str, msgspec.Raw])
        arguments = {
            key: msgspec.json.decode(raw, type=hints[key], dec_hook=_decode) for key, raw in given.items()
        }
        value = msgspec.json.encode(step(**arguments), enc_hook=_encode)
    except MissingExtra as error:
        return Reply(failure=Failure("MissingExtra", error.message, error.hint, error.package, error.extra))
    except VitExportError as error:
        return Reply(failure=Failure(type(error).__name__, error.message, error.hint))
    except MemoryError:
        return Reply(failure=Failure("TargetError", "there is not enough memory for this step"))
    except Exception as error:  # noqa: BLE001  (the edge of the process: report it)
        traceback.print_exc()
        return Reply(failure=Failure("TargetError", f"{type(error).__name__}: {error}"))
    return Reply(msgspec.Raw(value))


if __name__ == "__main__":
    main()
