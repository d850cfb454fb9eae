"""What of coremltools exists on macOS only, replaced by stand-ins with the same signatures.

`install` patches the real module in this process; a folder with a `sitecustomize.py` that calls it
(see `site_folder`) does the same in every process started from here. The stand-ins compute with the
reference interpreter, insist on what Apple's framework insists on, and note what they were asked.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

LOG = "FAKE_APPLE_LOG"  # file to which every load and predict adds a line
ABORT = "FAKE_APPLE_ABORT"  # compute units on which loading kills the process


class MLCPUComputeDevice:
    """As coremltools.models.compute_device."""


class MLNeuralEngineComputeDevice:
    """As coremltools.models.compute_device."""


class CompiledMLModel:
    """A compiled model: predicts with the interpreter."""

    def __init__(
        self,
        path: str,
        compute_units: Any = None,
        function_name: str | None = None,
        optimization_hints: dict[str, Any] | None = None,
        asset: Any = None,
    ) -> None:
        from vit_export.runtime.coreml_interpreter import Interpreter

        if not path.endswith(".mlmodelc"):
            raise RuntimeError(f"{path} is not a compiled model")
        if os.environ.get(ABORT) == compute_units.name:
            os.abort()
        note(f"load {compute_units.name} {function_name}")
        self._interpreter = Interpreter(Path(path) / "source.mlpackage", function_name)

    def predict(self, data: dict[str, Any], state: Any = None) -> dict[str, Any]:
        """Images must be PIL images of mode RGB, tensors arrays."""
        given = {}
        for feature in self._interpreter.inputs:
            value = data[feature.name]
            if feature.colors and getattr(value, "mode", None) != "RGB":
                raise TypeError(f"{feature.name} must be a PIL image")
            given[feature.name] = np.asarray(value)
        note(f"predict {sorted(data)}")
        return self._interpreter.predict(given)


def compile_model(model: str, destination_path: str | None = None) -> str | None:
    """Wrap the package in a folder, as the compiler would; only a new .mlmodelc is accepted."""
    assert destination_path is not None and destination_path.endswith(".mlmodelc")
    assert model.endswith(".mlpackage") and not Path(destination_path).exists()
    shutil.copytree(model, Path(destination_path) / "source.mlpackage")
    return destination_path


class MLComputePlan:
    """Linears and convolutions on the Neural Engine at cost 3, all else on the CPU at cost 1."""

    def __init__(self, kinds: dict[str, tuple[str, ...]]) -> None:
        blocks = {
            name: SimpleNamespace(
                block=SimpleNamespace(operations=[SimpleNamespace(operator_name=k) for k in ops])
            )
            for name, ops in kinds.items()
        }
        self.model_structure = SimpleNamespace(
            program=SimpleNamespace(functions=blocks), neuralnetwork=None, pipeline=None
        )

    @classmethod
    def load_from_path(cls, path: str, compute_units: Any = None) -> MLComputePlan:
        """Aborts the process, as the framework does, for anything that is not compiled."""
        from vit_export.runtime.mil_program import Package

        if not path.endswith(".mlmodelc"):
            os.abort()
        package = Package(Path(path) / "source.mlpackage")
        names = package.function_names
        kinds = {n: ("const", *(op.kind for op in package.function(n).operations)) for n in names}
        return cls(kinds)

    def get_compute_device_usage_for_mlprogram_operation(self, operation: Any) -> Any:
        """None for constants."""
        kind = operation.operator_name
        if kind == "const":
            return None
        fast = kind in ("linear", "conv")
        device = MLNeuralEngineComputeDevice() if fast else MLCPUComputeDevice()
        return SimpleNamespace(preferred_compute_device=device, supported_compute_devices=[device])

    def get_estimated_cost_for_mlprogram_operation(self, operation: Any) -> Any:
        """A weight; None for constants."""
        kind = operation.operator_name
        return None if kind == "const" else SimpleNamespace(weight=3.0 if kind in ("linear", "conv") else 1.0)


def note(line: str) -> None:
    """Append to the log, if there is one."""
    if path := os.environ.get(LOG):
        with Path(path).open("a") as file:
            file.write(line + "\n")


def install(set_attribute: Any = setattr) -> None:
    """Patch coremltools in this process."""
    from vit_export.runtime.mil_program import import_coremltools

    coremltools = import_coremltools()
    plans = import_coremltools("coremltools.models.compute_plan")
    set_attribute(coremltools.models, "CompiledMLModel", CompiledMLModel)
    set_attribute(coremltools.models.utils, "compile_model", compile_model)
    set_attribute(plans, "MLComputePlan", MLComputePlan)


def site_folder(folder: Path) -> str:
    """A value for PYTHONPATH that gives child processes the stand-ins, and no torch, as on a device."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import sys\nsys.modules.update(torch=None, sklearn=None)\nimport fake_apple\nfake_apple.install()\n"
    )
    shutil.copy(__file__, folder / "fake_apple.py")
    return str(folder)
