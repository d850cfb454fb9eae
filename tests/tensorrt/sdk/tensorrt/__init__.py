"""A TensorRT without a GPU: an "engine" is a JSON file that names an ONNX model and a batch profile.

Compute is queued on the fake CUDA stream and done by ONNX Runtime on the bytes at the tensor addresses.
test_fakes.py holds its names against the real bindings. Keys of the JSON: onnx, batches ([min, opt,
max] or null for the model's own), layers (for the inspector), dtype, refuse (what goes wrong).
"""

from __future__ import annotations

import ctypes
import json
import math
from enum import Enum

import numpy as np
import onnxruntime
from cuda.bindings import runtime as cuda

__version__ = "10.3.0"


class TensorIOMode(Enum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class DataType(Enum):
    FLOAT = 0
    HALF = 1


class LayerInformationFormat(Enum):
    ONELINE = 0
    JSON = 1


class Logger:
    ERROR = 1

    def __init__(self, severity: int) -> None:
        self.severity = severity


class Runtime:
    def __init__(self, logger: Logger) -> None:
        self.logger = logger

    def deserialize_cuda_engine(self, plan: bytes) -> ICudaEngine | None:
        """None for what is no engine, as the real one."""
        try:
            return ICudaEngine(json.loads(plan))
        except ValueError:
            return None


class ICudaEngine:
    num_io_tensors = 2
    device_memory_size_v2 = 4096

    def __init__(self, plan: dict) -> None:
        self._plan = plan
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(plan["onnx"], options, ["CPUExecutionProvider"])
        self._input, self._output = self._session.get_inputs()[0], self._session.get_outputs()[0]

    def get_tensor_name(self, index: int) -> str:
        return (self._input.name, self._output.name)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name == self._input.name else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[self._plan.get("dtype", "FLOAT")]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        node = self._input if name == self._input.name else self._output
        return tuple(dim if isinstance(dim, int) else -1 for dim in node.shape)

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [(batch, *self.get_tensor_shape(name)[1:]) for batch in self._plan["batches"]]

    def create_execution_context(self) -> IExecutionContext | None:
        return None if self._plan.get("refuse") == "context" else IExecutionContext(self)

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector(self._plan)


class EngineInspector:
    def __init__(self, plan: dict) -> None:
        self._plan = plan

    def get_engine_information(self, form: LayerInformationFormat) -> str:
        return json.dumps({"Layers": self._plan.get("layers", [])})


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine
        self._addresses: dict[str, int] = {}
        self._batch = engine.get_tensor_shape(engine._input.name)[0]

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        cuda.state.log.append(f"shape {shape[0]}")
        self._batch = shape[0]
        return self._engine._plan.get("refuse") != "shape"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self._batch, *self._engine.get_tensor_shape(name)[1:])

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        """Queue the network as it stands now: shape and addresses are those of the call."""
        cuda.state.log.append("execute")
        if self._engine._plan.get("refuse") == "execute":
            return False
        batch = self._batch

        def compute() -> None:
            engine = self._engine
            source, target = (self._addresses[n] for n in (engine._input.name, engine._output.name))
            shape = (batch, *engine.get_tensor_shape(engine._input.name)[1:])
            images = _read(source, math.prod(shape)).reshape(shape)
            logits = engine._session.run(None, {engine._input.name: images})[0]
            ctypes.memmove(target, logits.ctypes.data, logits.nbytes)
            cuda.state.clock_ms += cuda.KERNEL_MS

        cuda.state.streams[stream].push(compute)
        return True


def _read(address: int, count: int) -> np.ndarray:
    return np.frombuffer((ctypes.c_float * count).from_address(address), np.float32).copy()
