"""The CUDA runtime calls a TensorRT runner needs, behind a protocol small enough to fake.

`CudaRuntime` speaks through cuda-bindings, NVIDIA's own package, which has wheels for x86-64 and for
Jetson (aarch64) and needs no compiler. Addresses and handles are plain integers on both sides.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from vit_export.errors import MissingExtra, RunnerError

Address = int
Handle = int


class CudaError(RunnerError):
    """A CUDA call failed."""


class OutOfMemory(CudaError):
    """The GPU or the pinned host memory ran out."""


class Copy(IntEnum):
    """Direction of a copy, numbered as cudaMemcpyKind is."""

    TO_DEVICE = 1
    TO_HOST = 2


@dataclass(frozen=True, slots=True)
class Device:
    """The GPU in use. capability: (8, 7) for Jetson Orin. integrated: shares memory with the CPU."""

    name: str
    capability: tuple[int, int]
    memory_bytes: int
    integrated: bool
    driver: int


class Cuda(Protocol):
    """What a runner asks of CUDA. Every method raises CudaError when CUDA refuses."""

    def device(self) -> Device: ...
    def free_memory(self) -> int: ...
    def allocate(self, size: int) -> Address: ...
    def release(self, address: Address) -> None: ...
    def allocate_pinned(self, size: int) -> Address: ...
    def release_pinned(self, address: Address) -> None: ...
    def stream(self) -> Handle: ...
    def destroy_stream(self, stream: Handle) -> None: ...
    def synchronize(self, stream: Handle) -> None: ...
    def copy(self, to: Address, source: Address, size: int, direction: Copy, stream: Handle) -> None: ...
    def event(self) -> Handle: ...
    def destroy_event(self, event: Handle) -> None: ...
    def record(self, event: Handle, stream: Handle) -> None: ...
    def elapsed_ms(self, start: Handle, end: Handle) -> float: ...
    def begin_capture(self, stream: Handle) -> None: ...
    def end_capture(self, stream: Handle) -> Handle: ...
    def launch(self, graph: Handle, stream: Handle) -> None: ...
    def destroy_graph(self, graph: Handle) -> None: ...


HINTS: Mapping[str, str] = {
    "cudaErrorInsufficientDriver": "install or update the NVIDIA driver; `nvidia-smi` shows what it supports",
    "cudaErrorNoDevice": "no NVIDIA GPU is visible to this process",
    "cudaErrorMemoryAllocation": "use a smaller batch, or free GPU memory held by other processes",
    "cudaErrorNoKernelImageForDevice": "the engine was built for other GPUs; build it on this machine",
    "cudaErrorStubLibrary": "the CUDA driver library is a stub; run with the host's own libcuda",
}


class CudaRuntime:
    """`Cuda` through cuda.bindings.runtime. Raises MissingExtra, or CudaError without a usable GPU."""

    def __init__(self) -> None:
        try:
            self._rt: Any = importlib.import_module("cuda.bindings.runtime")
        except ImportError as error:
            raise MissingExtra("cuda-bindings", "tensorrt") from error
        self._call("cudaFree", 0)  # creates the context, so that a missing driver shows here

    def _call(self, name: str, *arguments: Any) -> Any:
        """Call a CUDA function; its results without the status, unpacked if there is one."""
        status, *results = getattr(self._rt, name)(*arguments)
        if int(status) != 0:
            raise cuda_error(name, status.name)
        return results[0] if len(results) == 1 else tuple(results)

    def device(self) -> Device:
        """Facts about the current device."""
        properties = self._call("cudaGetDeviceProperties", self._call("cudaGetDevice"))
        name = properties.name
        return Device(
            name=name.decode().rstrip("\0") if isinstance(name, bytes) else str(name),
            capability=(int(properties.major), int(properties.minor)),
            memory_bytes=int(properties.totalGlobalMem),
            integrated=bool(properties.integrated),
            driver=int(self._call("cudaDriverGetVersion")),
        )

    def free_memory(self) -> int:
        """Bytes of device memory that nothing uses."""
        return int(self._call("cudaMemGetInfo")[0])

    def allocate(self, size: int) -> Address:
        """Device memory."""
        return int(self._call("cudaMalloc", size))

    def release(self, address: Address) -> None:
        """Give device memory back."""
        self._call("cudaFree", address)

    def allocate_pinned(self, size: int) -> Address:
        """Page-locked host memory, which copies run from without a staging buffer."""
        return int(self._call("cudaMallocHost", size))

    def release_pinned(self, address: Address) -> None:
        """Give page-locked memory back."""
        self._call("cudaFreeHost", address)

    def stream(self) -> Handle:
        """A stream that does not wait for the legacy default stream."""
        return int(self._call("cudaStreamCreateWithFlags", self._rt.cudaStreamNonBlocking))

    def destroy_stream(self, stream: Handle) -> None:
        """End a stream."""
        self._call("cudaStreamDestroy", stream)

    def synchronize(self, stream: Handle) -> None:
        """Wait for everything enqueued; also where errors of kernels show."""
        self._call("cudaStreamSynchronize", stream)

    def copy(self, to: Address, source: Address, size: int, direction: Copy, stream: Handle) -> None:
        """Enqueue a copy of `size` bytes."""
        kind = self._rt.cudaMemcpyKind(int(direction))
        self._call("cudaMemcpyAsync", to, source, size, kind, stream)

    def event(self) -> Handle:
        """A timing event."""
        return int(self._call("cudaEventCreate"))

    def destroy_event(self, event: Handle) -> None:
        """End an event."""
        self._call("cudaEventDestroy", event)

    def record(self, event: Handle, stream: Handle) -> None:
        """Mark this point of the stream."""
        self._call("cudaEventRecord", event, stream)

    def elapsed_ms(self, start: Handle, end: Handle) -> float:
        """Milliseconds between two recorded events that have been reached."""
        return float(self._call("cudaEventElapsedTime", start, end))

    def begin_capture(self, stream: Handle) -> None:
        """Record what is enqueued instead of running it; only calls of this thread are restricted."""
        mode = self._rt.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)

    def end_capture(self, stream: Handle) -> Handle:
        """The captured work, ready to launch."""
        graph = self._call("cudaStreamEndCapture", stream)
        try:
            return int(self._call("cudaGraphInstantiate", graph, 0))
        finally:
            self._call("cudaGraphDestroy", graph)

    def launch(self, graph: Handle, stream: Handle) -> None:
        """Enqueue captured work."""
        self._call("cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: Handle) -> None:
        """End captured work."""
        self._call("cudaGraphExecDestroy", graph)


def cuda_error(call: str, status: str) -> CudaError:
    """The error for a status name such as `cudaErrorMemoryAllocation`, with what to do about it."""
    kind = OutOfMemory if status == "cudaErrorMemoryAllocation" else CudaError
    return kind(f"{call} failed with {status}", HINTS.get(status, ""))


def host_view(address: Address, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """float32 array over host memory at `address`, which must outlive it."""
    count = int(np.prod(shape))
    memory = (ctypes.c_float * count).from_address(address)
    return np.ctypeslib.as_array(memory).reshape(shape)
