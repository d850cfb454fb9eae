"""Finding the installed TensorRT and talking to either of its two Python packages in one way.

`tensorrt` and `tensorrt_rtx` share their API; what one lacks is asked for with `hasattr`, in one place
each. Variables that hold SDK objects keep the names of benchmarks/trt_api_conformance.py (`builder`,
`network`, `config`, ...), which checks every attribute used against the public bindings.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from vit_export.errors import MissingExtra, TargetError
from vit_export.export.trt_options import FlavorName


@dataclass(frozen=True, slots=True)
class Flavor:
    """One of the two products: its own name, its import name, the extra that installs it."""

    name: Literal["tensorrt", "rtx"]
    product: str
    module: str
    extra: str


FLAVORS: Mapping[str, Flavor] = {
    "tensorrt": Flavor("tensorrt", "TensorRT", "tensorrt", "tensorrt"),
    "rtx": Flavor("rtx", "TensorRT-RTX", "tensorrt_rtx", "tensorrt-rtx"),
}


class NoDevice(TargetError):
    """The installed TensorRT builds only where a GPU and its driver are."""


@dataclass(frozen=True, slots=True, eq=False)
class Sdk:
    """An imported TensorRT with a logger that keeps what it is told.

    messages: (severity name, text) of everything at warning level or above since the last `clear`.
    """

    trt: Any
    flavor: Flavor
    logger: Any
    messages: list[tuple[str, str]] = field(default_factory=list)

    @property
    def version(self) -> str:
        """As the package states it: `10.3.0`, `11.4.0.106`, `1.7.1.116`."""
        return str(self.trt.__version__)

    @property
    def product(self) -> str:
        """`TensorRT` or `TensorRT-RTX`."""
        return self.flavor.product

    def texts(self, *severities: str) -> tuple[str, ...]:
        """First lines of the messages of these severities, without repeats."""
        return tuple(
            dict.fromkeys(text.splitlines()[0] for name, text in self.messages if name in severities)
        )

    def builder(self) -> Any:
        """A builder; NoDevice where the SDK needs a GPU and finds none."""
        try:
            return self.trt.Builder(self.logger)
        except (TypeError, RuntimeError) as error:  # pybind11: "factory function returned nullptr"
            raise NoDevice(
                f"{self.product} {self.version} needs a GPU to build and found none",
                "; ".join(self.texts("ERROR", "INTERNAL_ERROR")[:1]) or str(error).splitlines()[0],
            ) from error


def why_not_here() -> str:
    """Why an engine cannot run on this machine, "" when it can: a driver with a GPU, and an SDK.

    Asks the driver itself (libcuda), which needs no CUDA package.
    """
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError:
        return "needs an NVIDIA GPU and driver, and this machine has no driver"
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return "needs an NVIDIA GPU, and the driver of this machine finds none"
    try:
        load("auto")
    except MissingExtra as error:
        return f"{error.message}: {error.hint}"
    return ""


def load(flavor: FlavorName) -> Sdk:
    """Import the wanted flavour; `auto` takes TensorRT, else TensorRT-RTX. Raises MissingExtra."""
    wanted = list(FLAVORS) if flavor == "auto" else [flavor]
    for name in wanted:
        try:
            return _load(FLAVORS[name])
        except (ImportError, OSError):  # OSError: the package is there, a CUDA library is not
            continue
    missing = FLAVORS[wanted[-1]]
    raise MissingExtra(missing.module, missing.extra)


@functools.cache
def _load(flavor: Flavor) -> Sdk:
    """One logger a process: the SDK keeps the first it is given and ignores every later one."""
    trt = importlib.import_module(flavor.module)
    messages: list[tuple[str, str]] = []
    return Sdk(trt, flavor, _logger(trt, messages), messages)


def _logger(trt: Any, messages: list[tuple[str, str]]) -> Any:
    """A logger for `trt` that appends to `messages`; the class needs the SDK to exist."""
    loud = (trt.ILogger.WARNING, trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR)

    class Collect(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if severity in loud:
                messages.append((severity.name, text))

    return Collect()
