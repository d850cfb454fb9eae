"""TensorRT and TensorRT-RTX on an NVIDIA GPU, Jetson included."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

import msgspec
import numpy as np

from vit_export.artifacts import Images, Latency, Logits, Runnable
from vit_export.errors import InputError, MissingExtra, RunnerError
from vit_export.runtime.latency import summarize
from vit_export.runtime.runner import Runner, Signature
from vit_export.runtime.trt_cuda import Cuda, CudaRuntime, Device
from vit_export.runtime.trt_inspector import engine_layers, int8_fallbacks
from vit_export.runtime.trt_jetson import JetsonState, read_jetson
from vit_export.runtime.trt_session import CallTimes, TensorRTSession

MODULES = ("tensorrt", "tensorrt_rtx")


class TensorRTOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """module: which SDK opens the engine; `auto` reads the manifest beside it, else tries both.

    cuda_graphs: replay compute as a CUDA graph where the engine allows it.
    """

    module: Literal["auto", "tensorrt", "tensorrt_rtx"] = "auto"
    cuda_graphs: bool = True


@dataclass(frozen=True, slots=True)
class DeviceTimes:
    """Where a call's time goes: the first three by the GPU's clock, the others by the CPU's."""

    compute: Latency
    to_device: Latency
    to_host: Latency
    enqueue: Latency
    host: Latency


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What the numbers were measured on.

    cuda_graph: "" when compute is replayed as a graph, else why not. memory_bytes: taken on the device
    by this engine's context and buffers. int8_fallbacks: modules meant to be int8 that are not.
    """

    device: Device
    version: str
    cuda_graph: str
    memory_bytes: int
    activation_bytes: int
    int8_fallbacks: tuple[str, ...]
    jetson: JetsonState | None


class TensorRTRunner(Runner):
    """Runs an .engine file. Besides the contract: `measure` splits a call, `facts` describes the device."""

    package: ClassVar[str] = "tensorrt"
    extra: ClassVar[str] = "tensorrt"

    def __init__(self, runnable: Runnable) -> None:
        super().__init__(runnable)
        self._stack = ExitStack()

    @property
    def version(self) -> str:
        """`tensorrt 10.3.0` or `tensorrt_rtx 1.7.1.116`, as the SDK states it."""
        return f"{self._trt.__name__} {self._trt.__version__}"

    def _open(self) -> Signature:
        options = self._options(TensorRTOptions)
        manifest = _manifest(self.runnable.path)
        self._int8_layers = tuple(str(name) for name in manifest.get("int8_layers", ()))
        self._trt = trt = self._import(options.module, manifest)
        self._cuda = self._make_cuda()
        self._logger = trt.Logger(trt.Logger.ERROR)
        self._runtime = runtime = trt.Runtime(self._logger)
        _prepare(runtime, manifest.get("options") or {})
        self._engine = engine = runtime.deserialize_cuda_engine(self.runnable.path.read_bytes())
        if engine is None:
            raise RunnerError(
                f"{trt.__name__} {trt.__version__} refused {self.runnable.path.name}",
                f"it was built by {manifest.get('version') or 'another version'} or for another GPU; "
                "build it here: vit-export verify on this folder",
            )
        session = TensorRTSession(trt, engine, self._cuda, graphs=options.cuda_graphs)
        self._session = self._stack.enter_context(session)
        shape = self._session.shape
        return Signature(shape.image_size, None if shape.dynamic else shape.batches[0], shape.input_name)

    def _make_cuda(self) -> Cuda:
        """The CUDA binding; tests give a fake one."""
        return CudaRuntime()

    def _import(self, module: str, manifest: Mapping[str, Any]) -> Any:
        """The SDK that built the engine, or the one asked for, or the first that is installed."""
        named = str(manifest.get("module") or "")
        wanted = [module] if module != "auto" else [named] if named in MODULES else list(MODULES)
        for name in wanted[:-1]:
            try:
                return self._sdk(name)
            except MissingExtra:
                continue
        if wanted[-1] == "tensorrt_rtx":
            try:
                return self._sdk("tensorrt_rtx")
            except MissingExtra:
                raise MissingExtra("tensorrt_rtx", "tensorrt-rtx") from None
        return self._sdk(wanted[-1])

    def _infer(self, images: Images) -> Logits:
        low, _, high = self._session.shape.batches
        if low <= len(images) <= high:
            return self._session.run(images)
        step = min(high, max(low, len(images)))
        missing = -len(images) % step
        padded = np.concatenate([images, np.repeat(images[-1:], missing, axis=0)]) if missing else images
        parts = [self._session.run(padded[i : i + step]) for i in range(0, len(padded), step)]
        return np.concatenate(parts)[: len(images)]

    def measure(self, images: Images, *, warmup: int = 10, runs: int = 50) -> DeviceTimes:
        """Split `runs` calls on `images` (float32 [batch, 3, H, W]) into copies, compute and host time."""
        self.signature.check_input(images)
        for _ in range(warmup):
            self._session.run(images)
        calls = [self._session.time(images) for _ in range(runs)]
        return DeviceTimes(**{part.name: _latency(calls, part.name) for part in fields(DeviceTimes)})

    def facts(self) -> DeviceFacts:
        """The device and how the engine sits on it; on a Jetson its clocks, power mode and heat, read now."""
        layers = engine_layers(self._trt, self._engine)
        return DeviceFacts(
            device=self._cuda.device(),
            version=self.version,
            cuda_graph=self._session.graph_refusal,
            memory_bytes=self._session.memory_bytes,
            activation_bytes=int(self._engine.device_memory_size_v2),
            int8_fallbacks=int8_fallbacks(layers, self._int8_layers),
            jetson=read_jetson(),
        )

    def details(self, images: Images) -> Mapping[str, Any]:
        """`facts` and the medians of `measure` on `images`, as the report carries them (ms, bytes)."""
        times = self.measure(images)
        split = {f"{part.name}_ms": round(getattr(times, part.name).p50, 4) for part in fields(DeviceTimes)}
        facts: dict[str, Any] = msgspec.to_builtins(self.facts())
        return {**facts, **split}

    def _close(self) -> None:
        self._stack.close()
        self._engine = self._runtime = None


def _prepare(runtime: Any, options: Mapping[str, Any]) -> None:
    """What a runtime must be told before it opens an engine built with these options."""
    if options.get("version_compatible"):
        runtime.engine_host_code_allowed = True  # such an engine carries its own runtime
    if options.get("dla_core") is not None:
        runtime.DLA_core = int(options["dla_core"])


def _latency(calls: list[CallTimes], part: str) -> Latency:
    return summarize(np.asarray([getattr(call, part) * 1e6 for call in calls], np.int64))


def _manifest(artifact: Path) -> Mapping[str, Any]:
    """The `.trt.json` beside an engine, {} without one. Raises InputError if it is not JSON."""
    path = artifact.with_suffix(".trt.json")
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is not a TensorRT manifest ({error})") from error
    return data if isinstance(data, dict) else {}
