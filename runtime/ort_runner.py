"""ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, Literal

import msgspec

from vit_export.artifacts import Images, Logits
from vit_export.errors import RunnerError
from vit_export.runtime.environment import cpu_features
from vit_export.runtime.onnx_metadata import SESSION, metadata
from vit_export.runtime.runner import Runner, Signature

# Session entries that a processor asks for: (entry, instructions it has, instructions it lacks). Without VNNI
# the u8 x s8 kernels of x86 saturate in between and answer wrongly; the entry takes the slower u8 x u8 ones
# (onnxruntime_session_options_config_keys.h, kOrtSessionOptionsAvx2PrecisionMode).
CPU_ENTRIES = (("session.x64quantprecision", "avx2", "vnni"),)


class OrtOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """optimization: of the graph at load; `extended` leaves the layout of tensors alone. output: its name,
    None for the first. streams: calls at once that share the threads; 0 for one call with all of them.

    fast_bf16: float products in bfloat16, on ARM processors that have it.
    spinning: idle threads poll for work for a moment after each operator (ONNX Runtime's own default).
    """

    optimization: Literal["all", "extended", "none"] = "all"
    output: str | None = None
    spinning: bool = True
    fast_bf16: bool = False
    streams: int = 0


class OrtRunner(Runner):
    """Runs an .onnx file with CPUExecutionProvider."""

    package: ClassVar[str] = "onnxruntime"
    extra: ClassVar[str] = "onnxruntime"

    def _open(self) -> Signature:
        self._take_session(metadata(self.runnable.path).get(SESSION, ""))
        self._choice = options = self._options(OrtOptions)
        ort = self._sdk("onnxruntime")
        self._session: Any = ort.InferenceSession(
            str(self.runnable.path), self._session_options(ort, options), providers=["CPUExecutionProvider"]
        )
        outputs = [output.name for output in self._session.get_outputs()]
        self._output = options.output or outputs[0]
        if self._output not in outputs:
            raise RunnerError(f"{self.runnable.path.name} has no output {self._output}", f"it has {outputs}")
        return _signature(self._session.get_inputs())

    def _session_options(self, ort: Any, options: OrtOptions) -> Any:
        session = ort.SessionOptions()
        session.intra_op_num_threads = self._threads_a_call(options)
        session.log_severity_level = 3  # errors; warnings would hide the worker's own last lines
        for entry in cpu_entries(cpu_features()):
            session.add_session_config_entry(entry, "1")
        if options.fast_bf16:
            session.add_session_config_entry("mlas.enable_gemm_fastmath_arm64_bfloat16", "1")
        session.add_session_config_entry("session.intra_op.allow_spinning", str(int(options.spinning)))
        levels = ort.GraphOptimizationLevel
        session.graph_optimization_level = {
            "all": levels.ORT_ENABLE_ALL,
            "extended": levels.ORT_ENABLE_EXTENDED,
            "none": levels.ORT_DISABLE_ALL,
        }[options.optimization]
        return session

    def _threads_a_call(self, options: OrtOptions) -> int:
        if options.streams < 2:
            return self.runnable.threads
        return max(1, self.runnable.threads // options.streams)

    @property
    def streams(self) -> int:
        """Threads that call the one session at once."""
        return max(1, self._choice.streams)

    def _rate(self, images: Images, end: float) -> int:
        if self.streams == 1:
            return super()._rate(images, end)
        one = super()._rate
        with ThreadPoolExecutor(self.streams) as pool:  # a call lets go of the interpreter
            counts = [pool.submit(one, images, end) for _ in range(self.streams)]
            return sum(count.result() for count in counts)

    def _infer(self, images: Images) -> Logits:
        logits: Logits = self._session.run([self._output], {self.signature.input_name: images})[0]
        return logits

    def _close(self) -> None:
        self._session = None


def cpu_entries(features: Collection[str]) -> tuple[str, ...]:
    """The entries of CPU_ENTRIES that a processor with these instructions asks for."""
    return tuple(entry for entry, has, lacks in CPU_ENTRIES if has in features and lacks not in features)


def _signature(inputs: list[Any]) -> Signature:
    """Name, size and batch of a session's only input; a batch that is not a number is free."""
    if len(inputs) != 1:
        raise RunnerError(f"the model has inputs {[i.name for i in inputs]}, expected one")
    node = inputs[0]
    if node.type != "tensor(float)" or len(node.shape) != 4:
        raise RunnerError(f"input {node.name} is {node.type} {node.shape}, expected float32 NCHW")
    batch, channels, height, width = node.shape
    if channels != 3 or not (isinstance(height, int) and isinstance(width, int)):
        raise RunnerError(f"input {node.name} is {node.shape}, expected [N, 3, H, W] with fixed H and W")
    return Signature((height, width), batch if isinstance(batch, int) else None, node.name)
