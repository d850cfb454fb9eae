"""A TensorRT without a GPU: an "engine" is a JSON file that names an ONNX model and a batch profile.

Compute is queued on the fake CUDA stream and done by ONNX Runtime on the bytes at the tensor addresses.
test_fakes.py holds its names against the real bindings. Keys of the JSON: onnx, batches ([min, opt,
max] or null for the model's own), layers (for the inspector), dtype, refuse (what goes wrong).
"""

from __future__ import annotations

import ctypes
import json
import math
from dataclasses import dataclass, field
from enum import Enum, IntEnum

import numpy as np
import onnxruntime
from cuda.bindings import runtime as cuda

__version__ = "10.3.0"
built: list[tuple[INetworkDefinition, IBuilderConfig]] = []  # what was built, for tests
no_gpu = False  # a test may set it: Builder then refuses as pybind11 does


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
    engine_host_code_allowed = False
    DLA_core = -1

    def __init__(self, logger: Logger) -> None:
        self.logger = logger

    def deserialize_cuda_engine(self, plan: bytes) -> ICudaEngine | None:
        """None for what is no engine, as the real one."""
        try:
            engine = ICudaEngine(json.loads(plan))
        except ValueError:
            return None
        wanted = engine._plan.get("needs", {})
        return engine if all(getattr(self, name) == value for name, value in wanted.items()) else None


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


class ILogger:
    WARNING, ERROR, INTERNAL_ERROR = "WARNING", "ERROR", "INTERNAL_ERROR"


class NetworkDefinitionCreationFlag(IntEnum):
    STRONGLY_TYPED = 1


class BuilderFlag(Enum):
    TF32 = 0
    VERSION_COMPATIBLE = 1
    GPU_FALLBACK = 2


class HardwareCompatibilityLevel(Enum):
    NONE = 0
    AMPERE_PLUS = 1


class ProfilingVerbosity(Enum):
    DETAILED = 2


class MemoryPoolType(Enum):
    WORKSPACE = 0


class DeviceType(Enum):
    GPU = 0
    DLA = 1


@dataclass
class ITimingCache:
    """Its bytes name the device it was made on; `FOREIGN` is one of another."""

    _content: bytes

    def serialize(self) -> bytes:
        return self._content + b"+timed"


@dataclass
class IBuilderConfig:
    """Remembers what was asked of it."""

    builder_optimization_level: int = 3
    profiling_verbosity: ProfilingVerbosity | None = None
    hardware_compatibility_level: HardwareCompatibilityLevel = HardwareCompatibilityLevel.NONE
    default_device_type: DeviceType = DeviceType.GPU
    DLA_core: int = -1
    _flags: set[BuilderFlag] = field(default_factory=lambda: {BuilderFlag.TF32})
    _limits: dict[MemoryPoolType, int] = field(default_factory=dict)
    _profiles: list[IOptimizationProfile] = field(default_factory=list)
    _cache: ITimingCache | None = None

    def set_flag(self, flag: BuilderFlag) -> None:
        self._flags.add(flag)

    def clear_flag(self, flag: BuilderFlag) -> None:
        self._flags.discard(flag)

    def set_memory_pool_limit(self, pool: MemoryPoolType, size: int) -> None:
        self._limits[pool] = size

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def create_timing_cache(self, stored: bytes) -> ITimingCache:
        return ITimingCache(stored)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        if cache._content.startswith(b"FOREIGN") and not ignore_mismatch:
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> ITimingCache | None:
        return self._cache


@dataclass
class IOptimizationProfile:
    _shapes: dict[str, tuple] = field(default_factory=dict)

    def set_shape(self, name: str, low: tuple, opt: tuple, high: tuple) -> None:
        self._shapes[name] = (low, opt, high)


@dataclass
class ITensor:
    name: str


@dataclass
class INetworkDefinition:
    _flags: int
    num_inputs: int = 0
    num_outputs: int = 0
    _onnx: str = ""

    def get_input(self, index: int) -> ITensor:
        return ITensor("images")


class OnnxParser:
    num_errors = 0

    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._network = network

    def parse_from_file(self, path: str) -> bool:
        self._network._onnx, self._network.num_inputs, self._network.num_outputs = path, 1, 1
        return True


class Builder:
    num_DLA_cores = 2

    def __init__(self, logger: ILogger) -> None:
        if no_gpu:
            raise TypeError("pybind11::init(): factory function returned nullptr")

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        return INetworkDefinition(flags)

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> bytes:
        """A plan the fake Runtime opens, so that build and run can be tried together."""
        built.append((network, config))
        batches = None
        if config._profiles:
            batches = [shape[0] for shape in config._profiles[0]._shapes["images"]]
        return json.dumps({"onnx": network._onnx, "batches": batches}).encode()
