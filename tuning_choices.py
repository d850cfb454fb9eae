"""What --tune may choose between, by target: the alternatives that exist and differ from machine to machine.

The first option is what an artifact gets without --tune. `build` options are those of the command line and
need a build of their own; `session` options say how a runner opens the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vit_export.artifacts import Precision
from vit_export.job import ExportJob
from vit_export.runtime.environment import cpu_features

_EVERY = tuple(Precision)
_INT8 = (Precision.INT8,)
_BF16 = {"avx512-bf16", "amx-bf16", "bf16"}


@dataclass(frozen=True, slots=True)
class Choice:
    """name: in the report. key: of the build or session option. where: whether this machine has it."""

    name: str
    kind: Literal["build", "session"]
    key: str
    options: tuple[Any, ...]
    precisions: tuple[Precision, ...] = _EVERY
    where: Callable[[], bool] = lambda: True


def _bf16() -> bool:
    return not _BF16.isdisjoint(cpu_features())


def _arm_bf16() -> bool:
    return {"neon", "bf16"} <= set(cpu_features())


CHOICES: Mapping[str, tuple[Choice, ...]] = {
    "onnx": (
        Choice("operators", "build", "onnx_operators", ("onnxruntime", "standard"), _INT8),
        Choice("opset", "build", "opset", (23, 20)),
        Choice("graph optimisation", "session", "optimization", ("all", "extended")),
        Choice("bfloat16 float products", "session", "fast_bf16", (False, True), _INT8, _arm_bf16),
        Choice("spinning threads", "session", "spinning", (True, False)),
    ),
    "openvino": (
        Choice("type of the float rest", "build", "openvino_precision", ("auto", "f32"), _INT8, _bf16),
        Choice("integer products", "build", "openvino_products", ("balanced", "plain"), _INT8),
        Choice("opset", "build", "opset", (20, 23)),
        Choice("hint", "session", "hint", ("LATENCY", "THROUGHPUT")),
    ),
}


def open_choices(job: ExportJob, target: str, precision: Precision) -> tuple[Choice, ...]:
    """The choices that this machine has and that no flag has closed."""
    given = {name for name, value in {**job.options, "opset": job.opset}.items() if value is not None}
    return tuple(
        choice
        for choice in CHOICES.get(target, ())
        if precision in choice.precisions and choice.key not in given and choice.where()
    )
