"""Apple's Core ML runtime, through coremltools: compile, load, predict, and where the work is placed.

Only macOS has it. Everything here belongs in a process of its own (a worker, or `main` of this module):
the framework can end its process, and planning anything but a compiled model does.

    python -m vit_export.runtime.coreml_device vit.mlpackage CPU_AND_NE      # placement as JSON
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from vit_export.errors import RunnerError
from vit_export.python310 import module_command
from vit_export.runtime.mil_program import Package, import_coremltools

_DEVICES = {  # class of coremltools.models.compute_device: name in reports
    "MLCPUComputeDevice": "cpu",
    "MLGPUComputeDevice": "gpu",
    "MLNeuralEngineComputeDevice": "neural engine",
}


@dataclass(frozen=True, slots=True)
class Placement:
    """Where Core ML plans to run a function.

    cost: device → share of the estimated cost, in 0..1. operations: device → how many it gets.
    compile_seconds: .mlpackage to .mlmodelc. load_seconds: of that for these compute units.
    """

    compute_units: str
    cost: Mapping[str, float]
    operations: Mapping[str, int]
    compile_seconds: float
    load_seconds: float


class AppleModel:
    """One function of a package, compiled into a temporary folder and loaded for some compute units."""

    def __init__(self, package: Package, function: str, compute_units: str) -> None:
        self._ct = import_coremltools()
        self._function = function
        self._units = self._ct.ComputeUnit[compute_units]
        self._folder = tempfile.TemporaryDirectory(prefix="vit-export-")
        self._compiled = str(Path(self._folder.name) / f"{package.path.stem}.mlmodelc")
        started = time.perf_counter()
        self._ct.models.utils.compile_model(str(package.path.resolve()), self._compiled)
        self.compile_seconds = time.perf_counter() - started
        # A package with one function is loaded without its name: naming one needs macOS 15.
        name = function if len(package.function_names) > 1 else None
        started = time.perf_counter()
        self._model: Any = self._ct.models.CompiledMLModel(self._compiled, self._units, function_name=name)
        self.load_seconds = time.perf_counter() - started

    def predict(self, features: Mapping[str, Any]) -> Mapping[str, Any]:
        """One call, as MLModel.predict: tensors are arrays, images PIL images."""
        outputs: Mapping[str, Any] = self._model.predict(dict(features))
        return outputs

    def placement(self) -> Placement:
        """Where the operations of the function go, weighted by their estimated cost."""
        plans = import_coremltools("coremltools.models.compute_plan")
        plan = plans.MLComputePlan.load_from_path(self._compiled, self._units)
        cost, operations = _shares(plan, self._function)
        return Placement(self._units.name, cost, operations, self.compile_seconds, self.load_seconds)

    def close(self) -> None:
        """Release the model and delete its compiled copy."""
        self._model = None
        self._folder.cleanup()


def placement(
    package: Path, compute_units: str, function: str | None = None, *, timeout: float = 600.0
) -> Placement:
    """Where one function of a package goes, found in a process of its own.

    Raises RunnerError with the last words of that process if it fails, or when it takes too long.
    """
    command = module_command("vit_export.runtime.coreml_device", str(package), compute_units, function or "")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired as error:
        raise RunnerError(f"Core ML took more than {timeout:g} s to plan {package.name}") from error
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RunnerError(f"Core ML could not plan {package.name} for {compute_units}", words[-1])
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=Placement)


def _shares(plan: Any, function: str) -> tuple[dict[str, float], dict[str, int]]:
    """Share of the estimated cost, and number of operations, of each preferred device."""
    cost: dict[str, float] = defaultdict(float)
    operations: dict[str, int] = defaultdict(int)
    for operation in plan.model_structure.program.functions[function].block.operations:
        usage = plan.get_compute_device_usage_for_mlprogram_operation(operation)
        estimate = plan.get_estimated_cost_for_mlprogram_operation(operation)
        if usage is None or estimate is None:  # constants are placed nowhere
            continue
        kind = type(usage.preferred_compute_device).__name__
        cost[_DEVICES.get(kind, kind)] += estimate.weight
        operations[_DEVICES.get(kind, kind)] += 1
    total = sum(cost.values()) or 1.0
    return {device: share / total for device, share in cost.items()}, dict(operations)


def main(path: str, compute_units: str, function: str) -> None:
    """Print the placement as one line of JSON."""
    package = Package(Path(path))
    model = AppleModel(package, function or package.function_names[0], compute_units)
    try:
        sys.stdout.write(msgspec.json.encode(model.placement()).decode() + "\n")
    finally:
        model.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
