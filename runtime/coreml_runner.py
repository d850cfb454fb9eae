"""Core ML packages: Apple's runtime on macOS, the reference interpreter everywhere else.

What the interpreter gives is right or wrong numbers, never a latency: `latency_reason` says so before
anything is timed, the runner's `version` says so in every report, and `time` refuses.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from vit_export.artifacts import Images, Logits, Preprocessing, Runnable
from vit_export.errors import InputError, RunnerError, UntrustedInput
from vit_export.runtime.coreml_device import AppleModel
from vit_export.runtime.coreml_interpreter import Interpreter
from vit_export.runtime.mil_program import Feature, Package
from vit_export.runtime.runner import Runner, Signature

REFERENCE = "reference interpreter, not Apple's runtime"
PREPROCESSING_KEY = "vit_export.preprocessing"  # user-defined metadata: the contract as JSON
ComputeUnits = Literal["ALL", "CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE"]


class CoreMLOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How to run a package.

    function: of a package with several; None for the default one. output: its name, None to find it.
    compute_units: what Apple's runtime may use. backend: `auto` is Apple's on macOS, else the reference.
    """

    function: str | None = None
    output: str | None = None
    compute_units: ComputeUnits = "ALL"
    backend: Literal["auto", "apple", "reference"] = "auto"

    @property
    def reference(self) -> bool:
        """Whether the interpreter runs the package."""
        return self.backend == "reference" or (self.backend == "auto" and sys.platform != "darwin")


class Model(Protocol):
    """What both runtimes offer: one call, features in, features out."""

    def predict(self, features: Mapping[str, Any]) -> Mapping[str, Any]:
        """Run once."""


def latency_reason(runnable: Runnable) -> str:
    """Why a Core ML artifact cannot be timed here; empty where it can."""
    options = msgspec.convert(dict(runnable.options), CoreMLOptions)
    return f"Core ML speed is only measurable on a Mac ({REFERENCE})" if options.reference else ""


class CoreMLRunner(Runner):
    """Runs an .mlpackage made by vit-export or by coremltools: one image or tensor input."""

    package: ClassVar[str] = "coremltools"
    extra: ClassVar[str] = "coreml"

    @property
    def version(self) -> str:
        """`coremltools 9.0, reference interpreter, not Apple's runtime` or `..., macOS 26.1, CPU_AND_NE`."""
        how = REFERENCE if self._choice.reference else f"{_system()}, {self._choice.compute_units}"
        return f"{self.package} {importlib.metadata.version(self.package)}, {how}"

    @property
    def measurable(self) -> bool:
        """Whether a latency of this runner means anything."""
        return not self._choice.reference

    @property
    def _choice(self) -> CoreMLOptions:
        return self._options(CoreMLOptions)

    def _open(self) -> Signature:
        try:
            return self._read()
        except UntrustedInput:
            raise
        except InputError as error:
            raise RunnerError(error.message, error.hint) from error

    def _read(self) -> Signature:
        package = Package(self.runnable.path)
        function = self._choice.function or package.function_names[0]
        self._input = _only_input(package.inputs(function))
        self._names = package.outputs(function)
        self._contract = _preprocessing(package.metadata) if self._input.colors else None
        self._given: tuple[Images | None, Mapping[str, Any]] = (None, {})
        self._model: Any = self._load(package, function)
        batch, _, height, width = _shape(self._input)
        return Signature((height, width), batch, self._input.name)

    def _load(self, package: Package, function: str) -> Model:
        if self._choice.reference:
            return Interpreter(package, function)
        return AppleModel(package, function, self._choice.compute_units)

    def _infer(self, images: Images) -> Logits:
        if images is not self._given[0]:  # the same array again, as when timed, is not converted again
            self._given = images, {self._input.name: self._converted(images)}
        return self._logits(self._model.predict(self._given[1]))

    def _converted(self, images: Images) -> Any:
        """What the package takes: the tensor itself, or the image it was made from."""
        if self._contract is None:
            return images
        pixels = _pixels(images, self._contract)
        if self._choice.reference:
            return pixels
        from PIL import Image

        return Image.fromarray(pixels[0])

    def _logits(self, outputs: Mapping[str, Any]) -> Logits:
        """The asked output, or the only tensor, or a classifier's scores in the order of its labels."""
        wanted = self._choice.output
        if wanted is not None and wanted not in outputs:
            raise RunnerError(f"{self.runnable.path.name} has no output {wanted}", f"it has {list(outputs)}")
        values = [outputs[wanted]] if wanted else [outputs[name] for name in self._names if name in outputs]
        tensors = [value for value in values if isinstance(value, np.ndarray)]
        scores = [list(value.values()) for value in values if isinstance(value, dict)]
        if len(tensors) > 1 or not (tensors or scores):
            raise RunnerError(f"{self.runnable.path.name} has outputs {list(outputs)}; choose one")
        return np.asarray(tensors[0] if tensors else scores, np.float32)

    def time(self, images: Images, **limits: Any) -> npt.NDArray[np.int64]:
        """As Runner.time; raises RunnerError where only the reference interpreter can run."""
        if reason := latency_reason(self.runnable):
            raise RunnerError(reason, "run `vit-export verify` on the Mac")
        return super().time(images, **limits)

    def _close(self) -> None:
        close = getattr(getattr(self, "_model", None), "close", None)
        if close:
            close()
        self._model = None
        self._given = (None, {})


def _only_input(features: tuple[Feature, ...]) -> Feature:
    if len(features) != 1 or len(features[0].declared.shape) != 4:
        names = [feature.name for feature in features]
        raise RunnerError(f"the package has inputs {names}, expected one of NCHW")
    return features[0]


def _shape(feature: Feature) -> tuple[int, int, int, int]:
    batch, channels, height, width = feature.declared.shape
    if batch is None or channels != 3 or height is None or width is None:
        raise RunnerError(f"input {feature.name} is {feature.declared.shape}, expected fixed [N, 3, H, W]")
    return batch, channels, height, width


def _preprocessing(metadata: Mapping[str, str]) -> Preprocessing:
    """The contract stored in the package, which turns tensors back into the pixels they came from."""
    try:
        return msgspec.json.decode(metadata[PREPROCESSING_KEY], type=Preprocessing)
    except (KeyError, msgspec.DecodeError) as error:
        raise InputError(
            "the Core ML package takes images and does not say how they are normalised",
            "export it with vit-export, or with a tensor input",
        ) from error


def _pixels(images: Images, contract: Preprocessing) -> npt.NDArray[np.uint8]:
    """float32 [1, 3, H, W] back to the uint8 [1, H, W, 3] whose `normalize` gave it; exact for those."""
    std, mean = (np.asarray(values, np.float32)[:, None, None] for values in (contract.std, contract.mean))
    levels: npt.NDArray[np.float32] = np.rint((images * std + mean) * 255.0)
    return np.ascontiguousarray(np.clip(levels, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1))


def _system() -> str:
    import platform

    return f"macOS {platform.mac_ver()[0]}"
