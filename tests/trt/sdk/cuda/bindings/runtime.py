"""A CUDA runtime without a GPU: the functions of cuda.bindings.runtime that the runner calls.

Work is queued on streams and done only when one is waited for, so a call that forgets to wait reads
stale bytes. "Device" memory is host memory; addresses are real, freed ones are refused. Copies and
kernels take fixed times on a clock of their own, which events read. `state` is what tests look at:
its log of calls, what is still allocated, the memory limit, and faults to inject.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum

cudaStreamNonBlocking = 1
COPY_MS_PER_MB, KERNEL_MS = 0.5, 3.0


class cudaError_t(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorNoDevice = 100
    cudaErrorInvalidResourceHandle = 400
    cudaErrorNotReady = 600
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900


class cudaMemcpyKind(IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class cudaStreamCaptureMode(IntEnum):
    cudaStreamCaptureModeThreadLocal = 1


@dataclass
class cudaDeviceProp:
    name: bytes = b"Fake Orin\0\0"
    major: int = 8
    minor: int = 7
    totalGlobalMem: int = 64 << 20
    integrated: int = 1


@dataclass
class Stream:
    """waiting: queued work. captured: work being recorded, None outside a capture."""

    waiting: list[Callable[[], None]] = field(default_factory=list)
    captured: list[Callable[[], None]] | None = None

    def push(self, work: Callable[[], None]) -> None:
        """Queue work, or record it."""
        (self.waiting if self.captured is None else self.captured).append(work)


@dataclass
class State:
    """Everything a test may look at or set. fail: function → status it returns, once."""

    limit: int = 64 << 20
    fail: dict[str, cudaError_t] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    device: dict[int, ctypes.Array[ctypes.c_char]] = field(default_factory=dict)
    pinned: dict[int, ctypes.Array[ctypes.c_char]] = field(default_factory=dict)
    streams: dict[int, Stream] = field(default_factory=dict)
    events: dict[int, float | None] = field(default_factory=dict)
    graphs: dict[int, list[Callable[[], None]]] = field(default_factory=dict)
    clock_ms: float = 0.0

    def alive(self) -> int:
        """Allocations, streams, events and graphs that nobody gave back."""
        return sum(map(len, (self.device, self.pinned, self.streams, self.events, self.graphs)))

    def device_bytes(self) -> int:
        """Device memory in use."""
        return sum(map(len, self.device.values()))


state = State()
_handles = itertools.count(1000)
_OK, _INVALID = cudaError_t.cudaSuccess, cudaError_t.cudaErrorInvalidValue
_BAD_HANDLE = cudaError_t.cudaErrorInvalidResourceHandle


def _called(name: str) -> cudaError_t:
    """Note the call; the status a test wants from it."""
    state.log.append(name)
    return state.fail.pop(name, _OK)


def _inside(address: int) -> bool:
    return any(a <= address < a + len(b) for pool in (state.device, state.pinned) for a, b in pool.items())


def _allocate(pool: dict[int, ctypes.Array[ctypes.c_char]], size: int) -> int:
    buffer = ctypes.create_string_buffer(size)
    pool[ctypes.addressof(buffer)] = buffer
    return ctypes.addressof(buffer)


def cudaFree(address):
    status = _called("cudaFree")
    if address and state.device.pop(address, None) is None:
        return (_INVALID,)
    return (status,)


def cudaGetDevice():
    return _OK, 0


def cudaGetDeviceProperties(device):
    return _OK, cudaDeviceProp()


def cudaDriverGetVersion():
    return _OK, 12060


def cudaMemGetInfo():
    return _OK, state.limit - state.device_bytes(), state.limit


def cudaMalloc(size):
    status = _called("cudaMalloc")
    if status == _OK and state.device_bytes() + size > state.limit:
        status = cudaError_t.cudaErrorMemoryAllocation
    return (status, _allocate(state.device, size) if status == _OK else None)


def cudaMallocHost(size):
    status = _called("cudaMallocHost")
    return (status, _allocate(state.pinned, size) if status == _OK else None)


def cudaFreeHost(address):
    return (_OK if state.pinned.pop(address, None) is not None else _INVALID,)


def cudaStreamCreateWithFlags(flags):
    handle = next(_handles)
    state.streams[handle] = Stream()
    return _called("cudaStreamCreateWithFlags"), handle


def cudaStreamDestroy(stream):
    return (_OK if state.streams.pop(stream, None) is not None else _BAD_HANDLE,)


def cudaStreamSynchronize(stream):
    status = _called("cudaStreamSynchronize")
    if state.streams[stream].captured is not None:
        return (cudaError_t.cudaErrorStreamCaptureUnsupported,)
    waiting, state.streams[stream].waiting = state.streams[stream].waiting, []
    for work in waiting:
        work()
    return (status,)


def cudaMemcpyAsync(to, source, size, kind, stream):
    name = {1: "copy to device", 2: "copy to host"}[int(kind)]
    status = _called(name)
    if not (_inside(to) and _inside(source)):
        return (_INVALID,)

    def copy() -> None:
        ctypes.memmove(to, source, size)
        state.clock_ms += COPY_MS_PER_MB * size / (1 << 20)

    state.streams[stream].push(copy)
    return (status,)


def cudaEventCreate():
    handle = next(_handles)
    state.events[handle] = None
    return _called("cudaEventCreate"), handle


def cudaEventDestroy(event):
    state.events.pop(event)
    return (_OK,)


def cudaEventRecord(event, stream):
    state.streams[stream].push(lambda: state.events.__setitem__(event, state.clock_ms))
    return (_called("cudaEventRecord"),)


def cudaEventElapsedTime(start, end):
    first, last = state.events[start], state.events[end]
    if first is None or last is None:
        return cudaError_t.cudaErrorNotReady, None
    return _OK, last - first


def cudaStreamBeginCapture(stream, mode):
    status = _called("cudaStreamBeginCapture")
    state.streams[stream].captured = [] if status == _OK else None
    return (status,)


def cudaStreamEndCapture(stream):
    status = _called("cudaStreamEndCapture")
    captured, state.streams[stream].captured = state.streams[stream].captured, None
    return status, captured


def cudaGraphInstantiate(graph, flags):
    handle = next(_handles)
    state.graphs[handle] = list(graph)
    return _called("cudaGraphInstantiate"), handle


def cudaGraphDestroy(graph):
    return (_OK,)


def cudaGraphLaunch(graph, stream):
    status = _called("cudaGraphLaunch")
    if graph not in state.graphs:
        return (_BAD_HANDLE,)
    for work in state.graphs[graph]:
        state.streams[stream].push(work)
    return (status,)


def cudaGraphExecDestroy(graph):
    return (_OK if state.graphs.pop(graph, None) is not None else _BAD_HANDLE,)
