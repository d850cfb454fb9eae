"""Steps that a child process is told to do in tests."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from vit_export.artifacts import Preprocessing
from vit_export.errors import MissingExtra, UnsupportedOperator


def typed(path: Path, contract: Preprocessing, names: tuple[str, ...] = ()) -> dict[str, Preprocessing]:
    """Arguments and results keep their types."""
    assert isinstance(path, Path) and isinstance(names, tuple)
    return {f"{path.name} {' '.join(names)}": contract}


def heavy() -> list[str]:
    """Which expensive packages the child has imported."""
    return sorted({"torch", "onnx", "numpy.testing"} & set(sys.modules))


def crash() -> None:
    print("vendor: about to fail", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)


def hang() -> None:
    time.sleep(600)


def out_of_memory() -> None:
    raise MemoryError


def refuse() -> None:
    raise UnsupportedOperator("no Erf of blocks.0", "use another opset")


def missing() -> None:
    raise MissingExtra("openvino", "openvino")


def bug() -> None:
    raise ZeroDivisionError("in the vendor's code")


def pid_then_wait(path: Path) -> None:
    path.write_text(str(os.getpid()))
    time.sleep(600)


def leave_a_helper(path: Path) -> None:
    """What a library with a process of its own for telemetry does."""
    pid = os.fork()
    if pid == 0:
        time.sleep(600)
        os._exit(0)
    path.write_text(str(pid))
