"""Building on the device what only the device can build, in a process of its own.

    python -m vit_export.runtime.build_here tensorrt model.trt.json      # one line of JSON

A vendor's builder may crash or hang; here that costs one row of the report. Builders are found through a
table, as runners are, and import neither torch nor onnx.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec

from vit_export import errors
from vit_export.errors import RunnerError, TargetError, VitExportError, WorkerCrash, WorkerTimeout
from vit_export.python310 import module_command

# Runner → (module:function from a manifest to a build, suffix of that manifest beside the artifact).
BUILDERS: Mapping[str, tuple[str, str]] = {
    "tensorrt": ("vit_export.export.trt_build:rebuild", ".trt.json"),
}


class Built(msgspec.Struct, frozen=True):
    """What a build gave: a file to run, or the reason why there is none; or an error's class and words."""

    path: str | None = None
    reason: str = ""
    error: str = ""
    hint: str = ""


def build_here(runner: str, artifact: Path, *, timeout: float) -> Path:
    """The file to run for an artifact of `runner` after what the device must build was built beside it.

    Returns `artifact` itself for runners that build nothing. Raises TargetError with the reason where the
    device cannot build, WorkerCrash or WorkerTimeout if the builder died or took too long, else its error.
    """
    if runner not in BUILDERS:
        return artifact
    manifest = artifact.with_suffix(BUILDERS[runner][1])
    command = module_command("vit_export.runtime.build_here", runner, str(manifest))
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired as late:
        raise WorkerTimeout(f"building {artifact.name} for {runner} took more than {timeout:g} s") from late
    lines = done.stdout.splitlines()
    try:
        built = msgspec.json.decode(lines[-1] if lines else "", type=Built)
    except msgspec.DecodeError:
        words = done.stderr.strip().splitlines()
        raise WorkerCrash(f"the {runner} builder ended with exit code {done.returncode}", words) from None
    return _path(built)


def _path(built: Built) -> Path:
    if built.error:
        kind = getattr(errors, built.error, RunnerError)
        error: VitExportError = kind.__new__(kind)
        VitExportError.__init__(error, built.reason, built.hint)
        raise error
    if built.path is None:
        raise TargetError(built.reason)
    return Path(built.path)


def main(runner: str, manifest: str) -> None:
    """Build and print a `Built` as the last line of stdout."""
    module, _, function = BUILDERS[runner][0].partition(":")
    try:
        build = getattr(importlib.import_module(module), function)(Path(manifest))
        built = Built(str(build.engine) if build.engine else None, build.reason)
    except VitExportError as error:
        built = Built(reason=error.message, error=type(error).__name__, hint=error.hint)
    sys.stdout.write("\n" + msgspec.json.encode(built).decode() + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
