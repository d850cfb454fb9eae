"""OpenVINO on the CPU: reads its own IR (.xml) or an .onnx file."""

from __future__ import annotations

import time
from typing import Any, ClassVar, Literal

import msgspec

from vit_export.artifacts import Images, Logits
from vit_export.errors import RunnerError
from vit_export.runtime.runner import Runner, Signature

_SESSION = ["vit_export", "session"]  # where export/openvino_ir_file.py writes what tuning chose


class OpenVinoOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """hint: what to compile for. output: its name, None for the first.

    inference_precision: type of what is not quantised; f32 makes comparisons exact, None leaves the
    choice to OpenVINO (bf16 on CPUs that have it). device: an OpenVINO device name.
    """

    hint: Literal["LATENCY", "THROUGHPUT"] = "LATENCY"
    inference_precision: Literal["f32", "f16", "bf16"] | None = "f32"
    output: str | None = None
    device: str = "CPU"


class OpenVinoRunner(Runner):
    """Compiles a static shape for each batch it meets, as a user who cares for latency would.

    A model left dynamic runs slower kernels; compiled requests are kept, one a batch size.
    """

    package: ClassVar[str] = "openvino"
    extra: ClassVar[str] = "openvino"

    def _open(self) -> Signature:
        self._ov: Any = self._sdk("openvino")
        self._core: Any = self._ov.Core()
        self._model: Any = self._core.read_model(str(self.runnable.path))
        if self._model.has_rt_info(_SESSION):
            self._take_session(self._model.get_rt_info(_SESSION).astype(str))
        self._choice = self._options(OpenVinoOptions)
        self._output: Any = self._choice.output or 0
        outputs = sorted(name for output in self._model.outputs for name in output.names)
        if self._choice.output and self._choice.output not in outputs:
            raise RunnerError(f"the model has no output {self._choice.output}", f"it has {outputs}")
        self._compiled: dict[int, Any] = {}
        self._requests: dict[int, Any] = {}
        signature = _signature(self._model.inputs)
        self._request(signature.batch or 1)  # refuse here, not at the first image
        return signature

    def _infer(self, images: Images) -> Logits:
        request = self._request(len(images))
        # Sharing spares one copy of the input; the output is copied, for the request will reuse it.
        logits: Logits = request.infer([images], share_inputs=True)[self._output]
        return logits

    def _request(self, batch: int) -> Any:
        """The infer request of the model compiled for [batch, 3, H, W]."""
        if batch not in self._requests:
            self._requests[batch] = self._network(batch).create_infer_request()
        return self._requests[batch]

    def _network(self, batch: int) -> Any:
        if batch not in self._compiled:
            shape = self._model.inputs[0].partial_shape
            if shape.is_dynamic or shape[0].get_length() != batch:
                shape[0] = batch
                self._model.reshape(shape)
            self._compiled[batch] = self._core.compile_model(self._model, self._choice.device, self._config())
        return self._compiled[batch]

    @property
    def streams(self) -> int:
        """Requests at once: one, or what OpenVINO finds best under the THROUGHPUT hint."""
        if self._choice.hint == "LATENCY":
            return 1
        network = next(iter(self._compiled.values()))
        return int(network.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))

    def _rate(self, images: Images, end: float) -> int:
        if self.streams == 1:
            return super()._rate(images, end)
        queue = self._ov.AsyncInferQueue(self._network(len(images)), self.streams)
        calls = 0
        while calls < 2 * self.streams or time.perf_counter() < end:
            queue.start_async([images], share_inputs=True)  # waits for a free request
            calls += 1
        queue.wait_all()
        return calls

    def _config(self) -> dict[str, Any]:
        config: dict[str, Any] = {"PERFORMANCE_HINT": self._choice.hint}
        if self._choice.inference_precision:
            config["INFERENCE_PRECISION_HINT"] = self._choice.inference_precision
        if self.runnable.threads and self._choice.device == "CPU":
            config["INFERENCE_NUM_THREADS"] = self.runnable.threads
        return config

    def _close(self) -> None:
        self._requests, self._compiled, self._model, self._core = {}, {}, None, None


def _signature(inputs: list[Any]) -> Signature:
    """Name, size and batch of a model's only input."""
    if len(inputs) != 1:
        raise RunnerError(f"the model has {len(inputs)} inputs, expected one")
    node, shape = inputs[0], inputs[0].partial_shape
    kind = node.element_type.get_type_name()
    if kind != "f32" or len(shape) != 4 or any(shape[i].is_dynamic for i in (1, 2, 3)):
        raise RunnerError(f"input is {kind} {shape}, expected f32 [N, 3, H, W] with fixed H and W")
    batch = None if shape[0].is_dynamic else shape[0].get_length()
    return Signature((shape[2].get_length(), shape[3].get_length()), batch, node.get_any_name())
