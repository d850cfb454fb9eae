"""The near end of a worker process: spawn it, ask it, and turn crash, hang or nonsense into an error.

with Worker(Runnable("onnx", Path("model.onnx"), threads=2)) as worker:
    logits = worker.infer(data, out=Path("logits.npy"))
    ns = worker.time(batch=1, warmup=5, runs=25)
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from vit_export import errors
from vit_export.artifacts import EvalSet, Logits, Runnable
from vit_export.errors import MissingExtra, RunnerError, VitExportError, WorkerCrash, WorkerTimeout
from vit_export.python310 import module_command
from vit_export.runtime import protocol
from vit_export.runtime.environment import physical_cores

if TYPE_CHECKING:
    from typing_extensions import Self

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
_LAST_LINES = 20
_GOODBYE_SECONDS = 5.0

Answer = TypeVar("Answer", bound=protocol.Message)


class Worker:
    """One runtime in a process of its own. Use as a context manager: entry opens the artifact.

    runnable.threads of 0 means the physical cores this process may use; the number is set both in the
    environment of the worker (before any SDK can read it) and in what the runner is told.
    timeout: seconds without any reply after which the worker is killed; a long `infer` replies after
    every batch, so the limit is for one batch, not for the whole set.

    Every method raises the error the worker reported (MissingExtra, InputError, RunnerError...),
    WorkerCrash if it died, or WorkerTimeout if it had to be killed. After the last two it is gone.
    """

    def __init__(self, runnable: Runnable, *, timeout: float = 600.0) -> None:
        self.runnable = replace(runnable, threads=runnable.threads or physical_cores())
        self._timeout = timeout
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._stderr: deque[str] = deque(maxlen=_LAST_LINES)
        self._process: subprocess.Popen[bytes] | None = None
        self._opened: protocol.Opened | None = None

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            module_command("vit_export.runtime.worker"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=pool_environment(os.environ, self.runnable.threads),
            start_new_session=True,  # Ctrl-C is ours to handle, and one kill ends its children too
        )
        self._start_readers(self._process)
        try:
            self._opened = self._ask(protocol.Open(self.runnable), protocol.Opened)
        except BaseException:
            self._kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._process is not None and self._process.poll() is None:
            self._say_goodbye(self._process)
        self._kill()

    @property
    def opened(self) -> protocol.Opened:
        """What the artifact takes, the runtime's version and how long opening took."""
        if self._opened is None:
            raise RunnerError("the worker is not running", "use it in a `with` block")
        return self._opened

    def time(
        self,
        data: EvalSet | None = None,
        *,
        batch: int = 1,
        warmup: int = 5,
        runs: int = 25,
        min_seconds: float = 0.0,
        max_seconds: float = 60.0,
    ) -> npt.NDArray[np.int64]:
        """Nanoseconds of at least `runs` calls and `min_seconds`, on the first images of `data`.

        Without data the input is seeded noise. `max_seconds` ends warm-up and calls early, but never
        before one call of each.
        """
        limits = (batch, warmup, runs, min_seconds, max_seconds)
        request = protocol.Time(*limits, *((data.pixels, data.preprocessing) if data else ()))
        timed = self._ask(request, protocol.Timed, patience=2 * max_seconds)
        return np.asarray(timed.ns, np.int64)

    def rate(self, data: EvalSet | None = None, *, batch: int = 1, seconds: float = 1.0) -> protocol.Rated:
        """How many images go through in about `seconds`, after one call that is not counted."""
        request = protocol.Rate(batch, seconds, *((data.pixels, data.preprocessing) if data else ()))
        return self._ask(request, protocol.Rated, patience=seconds)

    def infer(
        self,
        data: EvalSet,
        out: Path,
        *,
        batch: int = 16,
        progress: protocol.ProgressCallback | None = None,
    ) -> Logits:
        """All images of `data`, `batch` at a time, into `out` (.npy); returned memory-mapped, [N, K]."""
        request = protocol.Infer(data.pixels.absolute(), data.preprocessing, batch, out.absolute())
        self._ask(request, protocol.Inferred, progress=progress)
        logits: Logits = np.load(out, mmap_mode="r", allow_pickle=False)
        return logits

    def details(self, data: EvalSet) -> Mapping[str, Any]:
        """How the runtime runs the artifact, measured on the first images of `data`; see Runner.details."""
        request = protocol.Describe(self.opened.batch or 1, data.pixels.absolute(), data.preprocessing)
        return self._ask(request, protocol.Described).details

    def info(self) -> protocol.Info:
        """Version of the runtime and peak memory of the process so far."""
        return self._ask(protocol.Ask(), protocol.Info)

    def _ask(
        self,
        request: protocol.Request,
        expected: type[Answer],
        *,
        patience: float = 0.0,
        progress: protocol.ProgressCallback | None = None,
    ) -> Answer:
        """Send a request and wait for its answer, at most `timeout + patience` seconds a reply."""
        self._send(request)
        while True:
            reply = self._receive(self._timeout + patience)
            match reply:
                case protocol.Progress():
                    if progress:
                        progress(self.runnable.runner, reply.done, reply.total)
                case protocol.Missing():
                    raise MissingExtra(reply.package, reply.extra)
                case protocol.Failed():
                    raise _error(reply)
                case _ if isinstance(reply, expected):
                    return reply
                case _:
                    raise self._lost(f"answered {type(reply).__name__} to {type(request).__name__}")

    def _send(self, request: protocol.Request) -> None:
        if self._process is None or self._process.stdin is None:
            raise RunnerError("the worker is not running", "use it in a `with` block")
        try:
            self._process.stdin.write(protocol.encode(request))
            self._process.stdin.flush()
        except OSError:  # a broken pipe: it is dead or dying
            raise self._crash() from None

    def _receive(self, seconds: float) -> protocol.Reply:
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            self._kill()
            raise WorkerTimeout(
                f"{self._name} did not answer for {seconds:g} s", tuple(self._stderr)
            ) from None
        if line is None:
            raise self._crash()
        try:
            return protocol.decode_reply(line)
        except msgspec.DecodeError:
            raise self._lost(f"wrote {line[:60]!r} where a reply belongs") from None

    def _crash(self) -> WorkerCrash:
        """The error for a worker that closed its end: how it died, with its last words."""
        process = self._process
        try:
            code = process.wait(_GOODBYE_SECONDS) if process else None
        except subprocess.TimeoutExpired:
            code = None
        self._kill()
        died = signal.Signals(-code).name if code is not None and code < 0 else None
        how = f"died with {died}" if died else f"ended with exit code {code}"
        if died == "SIGKILL":
            how += " (the system does that when memory runs out)"
        return WorkerCrash(f"{self._name} {how}", tuple(self._stderr), died)

    def _lost(self, what: str) -> WorkerCrash:
        """The error for a worker that cannot be understood any more; it is killed."""
        self._kill()
        return WorkerCrash(f"{self._name} {what}", tuple(self._stderr), None)

    @property
    def _name(self) -> str:
        return f"the {self.runnable.runner} worker running {self.runnable.path.name or self.runnable.path}"

    def _start_readers(self, process: subprocess.Popen[bytes]) -> None:
        """Threads that drain both pipes, so that neither side can block on a full one."""
        assert process.stdout is not None
        assert process.stderr is not None
        self._readers = [
            threading.Thread(target=_read_lines, args=(process.stdout, self._lines), daemon=True),
            threading.Thread(target=_keep_text, args=(process.stderr, self._stderr), daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def _say_goodbye(self, process: subprocess.Popen[bytes]) -> None:
        """Let the runner close by itself; what hangs or has died meanwhile is left to _kill."""
        with suppress(VitExportError, subprocess.TimeoutExpired):
            self._send(protocol.Close())
            process.wait(_GOODBYE_SECONDS)

    def _kill(self) -> None:
        """End the process and its children, and free the pipes. Does nothing the second time."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            _kill_group(process)
        process.wait()
        for reader in self._readers:
            reader.join(1.0)
        if not any(reader.is_alive() for reader in self._readers):  # closing under a reader would block
            for pipe in (process.stdin, process.stdout, process.stderr):
                _close(pipe)


def pool_environment(parent: Mapping[str, str], threads: int) -> dict[str, str]:
    """The parent's variables with the thread pools of OpenMP and the BLAS libraries set to `threads`."""
    return {**parent, **dict.fromkeys(_THREAD_VARIABLES, str(threads)), "PYTHONUNBUFFERED": "1"}


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the worker's session; Windows has no sessions, there only the worker itself."""
    if sys.platform == "win32":
        process.kill()
    else:
        with suppress(ProcessLookupError):  # it ended by itself just now
            os.killpg(process.pid, signal.SIGKILL)


def _read_lines(pipe: IO[bytes], lines: queue.SimpleQueue[bytes | None]) -> None:
    """Pass lines on; None says that there will be no more."""
    for line in pipe:
        lines.put(line)
    lines.put(None)


def _keep_text(pipe: IO[bytes], lines: deque[str]) -> None:
    for line in pipe:
        if text := line.decode(errors="replace").strip():
            lines.append(text)


def _close(pipe: IO[bytes] | None) -> None:
    """Close a pipe whose other end may be gone; what was still buffered is of no use to anyone."""
    with suppress(OSError):
        if pipe is not None:
            pipe.close()


def _error(reply: protocol.Failed) -> VitExportError:
    """The error a worker reported, as the class it had there; RunnerError for one unknown here."""
    kind = getattr(errors, reply.kind, RunnerError)
    if not (isinstance(kind, type) and issubclass(kind, VitExportError)):
        kind = RunnerError
    error = kind.__new__(kind)
    VitExportError.__init__(error, reply.message, reply.hint)
    return error
