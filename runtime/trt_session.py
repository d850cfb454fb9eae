"""One TensorRT engine with its buffers and stream: the order of the calls that make an inference.

    host array → pinned buffer → device, compute, device → pinned buffer → host array

Copies and compute are enqueued on one stream, so CUDA keeps their order; the host waits once, at the
end. Compute is replayed as a CUDA graph where the engine allows it (no launch cost per layer). It is
captured after a first plain run, because TensorRT finishes shape work there, and thrown away when the
batch changes: a graph is valid only for the state its execution context was captured in.
Variables that hold SDK objects are named as in benchmarks/trt_api_conformance.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vit_export.artifacts import Images, Logits, Size
from vit_export.errors import RunnerError
from vit_export.runtime.trt_cuda import Copy, Cuda, CudaError, Handle, host_view

if TYPE_CHECKING:
    from typing_extensions import Self

Shape = tuple[int, ...]
_FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True)
class CallTimes:
    """Milliseconds of one call: on the device by CUDA events, on the host by its clock.

    host: from the array in to the array out, waiting included; enqueue: until the work was handed over.
    """

    to_device: float
    compute: float
    to_host: float
    enqueue: float
    host: float


@dataclass(frozen=True, slots=True)
class EngineShape:
    """Names and limits of an engine's one input and one output. batches: (min, opt, max) or (N, N, N)."""

    input_name: str
    output_name: str
    image_size: Size
    batches: tuple[int, int, int]

    @property
    def dynamic(self) -> bool:
        """Whether more than one batch size is allowed."""
        return self.batches[0] != self.batches[2]

    @staticmethod
    def of(trt: Any, engine: Any) -> EngineShape:
        """Read from an engine. Raises RunnerError unless it maps float32 [N, 3, H, W] to float32."""
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        outputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.OUTPUT]
        if len(inputs) != 1 or len(outputs) != 1:
            raise RunnerError(f"the engine has inputs {inputs} and outputs {outputs}, expected one of each")
        half = [n for n in names if engine.get_tensor_dtype(n) != trt.DataType.FLOAT]
        if half:
            raise RunnerError(f"the engine's {', '.join(half)} is not float32", "export it with vit-export")
        shape = tuple(engine.get_tensor_shape(inputs[0]))
        if len(shape) != 4 or shape[1] != 3:
            raise RunnerError(f"the engine takes {shape}, expected [N, 3, H, W]")
        batches = (shape[0],) * 3
        if shape[0] == -1:
            low, opt, high = engine.get_tensor_profile_shape(inputs[0], 0)
            batches = (low[0], opt[0], high[0])
        return EngineShape(inputs[0], outputs[0], (shape[2], shape[3]), batches)


class TensorRTSession:
    """Runs an engine. Owns its stream, buffers and graphs; a context manager. Not thread-safe.

    graphs: capture CUDA graphs where possible; `graph_refusal` says why one was not.
    Raises OutOfMemory or CudaError (both RunnerError) on entry and on `run`.
    """

    def __init__(self, trt: Any, engine: Any, cuda: Cuda, *, graphs: bool = True) -> None:
        self.shape = EngineShape.of(trt, engine)
        self.graph_refusal = "" if graphs else "turned off"
        self._engine, self._cuda = engine, cuda
        self._graph: Handle | None = None
        self._batch = 0
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        try:
            self._open()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _open(self) -> None:
        cuda, shape = self._cuda, self.shape
        free = cuda.free_memory()
        self._stream = self._own(cuda.stream(), cuda.destroy_stream)
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise RunnerError(
                "TensorRT made no execution context", "too little GPU memory? use a smaller max batch"
            )
        self._stack.callback(self._drop_context)
        self._input_shape: Shape = (shape.batches[2], 3, *shape.image_size)
        self._set_batch(shape.batches[2])
        self._output_shape: Shape = tuple(self._context.get_tensor_shape(shape.output_name))
        if len(self._output_shape) != 2 or min(self._output_shape) < 1:
            raise RunnerError(f"the engine's output is {self._output_shape}, expected [N, K]")
        self._device_in, self._host_in = self._buffers(self._input_shape)
        self._device_out, self._host_out = self._buffers(self._output_shape)
        self._context.set_tensor_address(shape.input_name, self._device_in)
        self._context.set_tensor_address(shape.output_name, self._device_out)
        self._events = [self._own(cuda.event(), cuda.destroy_event) for _ in range(4)]
        self._stack.callback(self._drop_graph)
        self._stack.callback(self._settle)
        self.memory_bytes = max(0, free - cuda.free_memory())

    def _own(self, handle: Handle, destroy: Callable[[Handle], None]) -> Handle:
        """Destroy `handle` on exit, in the reverse order of creation."""
        self._stack.callback(destroy, handle)
        return handle

    def _buffers(self, shape: Shape) -> tuple[int, int]:
        """(device, pinned host) memory for float32 of `shape`."""
        size, cuda = int(np.prod(shape)) * _FLOAT_BYTES, self._cuda
        device = self._own(cuda.allocate(size), cuda.release)
        return device, self._own(cuda.allocate_pinned(size), cuda.release_pinned)

    def _settle(self) -> None:
        """Wait for the stream before anything it uses is freed; a broken stream has nothing to wait for."""
        try:
            self._cuda.synchronize(self._stream)
        except CudaError:
            self.graph_refusal = self.graph_refusal or "the stream was lost"

    def _drop_context(self) -> None:
        self._context = None

    def _drop_graph(self) -> None:
        graph, self._graph = self._graph, None
        if graph is not None:
            self._cuda.destroy_graph(graph)

    def _set_batch(self, batch: int) -> None:
        """Give the context an input shape; free when it has it already."""
        if batch == self._batch:
            return
        low, _, high = self.shape.batches
        if not low <= batch <= high:
            raise RunnerError(f"batch {batch} is outside the engine's {low} to {high}")
        if not self._context.set_input_shape(self.shape.input_name, (batch, 3, *self.shape.image_size)):
            raise RunnerError(f"TensorRT refused batch {batch}")
        self._drop_graph()
        self._batch = batch

    def run(self, images: Images) -> Logits:
        """float32 [N, 3, H, W] to float32 [N, K], N within the engine's batches; waits for the result."""
        self._enqueue(images, timed=False)
        return self._collect(len(images))

    def time(self, images: Images) -> CallTimes:
        """The same call with CUDA events around its parts. The first after a new batch size also captures."""
        began = time.perf_counter()
        self._enqueue(images, timed=True)
        handed_over = time.perf_counter()
        self._collect(len(images))
        done = time.perf_counter()
        start, copied, computed, end = self._events
        return CallTimes(
            to_device=self._cuda.elapsed_ms(start, copied),
            compute=self._cuda.elapsed_ms(copied, computed),
            to_host=self._cuda.elapsed_ms(computed, end),
            enqueue=(handed_over - began) * 1e3,
            host=(done - began) * 1e3,
        )

    def _enqueue(self, images: Images, *, timed: bool) -> None:
        cuda, stream, batch = self._cuda, self._stream, len(images)
        self._set_batch(batch)
        if self._graph is None and not self.graph_refusal:
            self._capture()
        marks = iter(self._events if timed else ())
        self._mark(marks)
        np.copyto(host_view(self._host_in, images.shape), images)
        cuda.copy(self._device_in, self._host_in, images.nbytes, Copy.TO_DEVICE, stream)
        self._mark(marks)
        self._compute()
        self._mark(marks)
        size = batch * self._output_shape[1] * _FLOAT_BYTES
        cuda.copy(self._host_out, self._device_out, size, Copy.TO_HOST, stream)
        self._mark(marks)

    def _mark(self, marks: Any) -> None:
        event = next(marks, None)
        if event is not None:
            self._cuda.record(event, self._stream)

    def _compute(self) -> None:
        if self._graph is not None:
            self._cuda.launch(self._graph, self._stream)
        elif not self._context.execute_async_v3(self._stream):
            raise RunnerError("TensorRT could not enqueue the network")

    def _collect(self, batch: int) -> Logits:
        """Wait, then copy out of the pinned buffer, which the next call overwrites."""
        self._cuda.synchronize(self._stream)
        logits: Logits = host_view(self._host_out, (batch, self._output_shape[1])).copy()
        return logits

    def _capture(self) -> None:
        """Run once plainly, then record the same work; on refusal go on without graphs and say why."""
        if not self._context.execute_async_v3(self._stream):
            raise RunnerError("TensorRT could not enqueue the network")
        self._cuda.synchronize(self._stream)
        capturable = getattr(self._context, "is_stream_capturable", None)  # TensorRT-RTX only
        if capturable is not None and not capturable(self._stream):
            self.graph_refusal = "this engine cannot be captured"
            return
        try:
            self._cuda.begin_capture(self._stream)
            enqueued = self._context.execute_async_v3(self._stream)
            graph = self._cuda.end_capture(self._stream)
        except CudaError as error:
            self.graph_refusal = error.message
            return
        if enqueued:
            self._graph = graph
        else:
            self._cuda.destroy_graph(graph)
            self.graph_refusal = "TensorRT refused to be captured"
