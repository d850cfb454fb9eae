"""ONNX Runtime on the CPU."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import msgspec

from vit_export.artifacts import Images, Logits
from vit_export.errors import RunnerError
from vit_export.runtime.runner import Runner, Signature


class OrtOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """optimization: of the graph at load. output: its name, None for the first.

    spinning: idle threads poll for work for a moment after each operator (ONNX Runtime's own default).
    """

    optimization: Literal["all", "none"] = "all"
    output: str | None = None
    spinning: bool = True


class OrtRunner(Runner):
    """Runs an .onnx file with CPUExecutionProvider."""

    package: ClassVar[str] = "onnxruntime"
    extra: ClassVar[str] = "onnxruntime"

    def _open(self) -> Signature:
        options = self._options(OrtOptions)
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
        session.intra_op_num_threads = self.runnable.threads
        session.log_severity_level = 3  # errors; warnings would hide the worker's own last lines
        session.add_session_config_entry("session.intra_op.allow_spinning", str(int(options.spinning)))
        levels = ort.GraphOptimizationLevel
        session.graph_optimization_level = {
            "all": levels.ORT_ENABLE_ALL,
            "none": levels.ORT_DISABLE_ALL,
        }[options.optimization]
        return session

    def _infer(self, images: Images) -> Logits:
        logits: Logits = self._session.run([self._output], {self.signature.input_name: images})[0]
        return logits

    def _close(self) -> None:
        self._session = None


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
