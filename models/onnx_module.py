"""An imported ONNX graph as a torch module that runs its nodes one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from vit_export.models.onnx_call import Call, Host, Value, as_tensor
from vit_export.models.onnx_ops import OPS


@dataclass(frozen=True, slots=True)
class Step:
    """One node to run: `layer` is the path of an nn.Linear or convolution, else `op` is in OPS.

    frees: values that no later step reads.
    """

    op: str
    label: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    scope: str = ""
    layer: str | None = None
    frees: tuple[str, ...] = ()


class OnnxModule(nn.Module):
    """Runs the steps of an ONNX graph on float32 [batch, 3, H, W].

    Returns the graph's one output, or a dict of them by name. Filled by onnx_build.
    """

    def __init__(self, source: str, outputs: Sequence[str], opset: int) -> None:
        super().__init__()
        self.source, self.outputs, self.opset = source, tuple(outputs), opset
        self.steps: tuple[Step, ...] = ()
        self.host: dict[str, Host] = {}
        self.named: dict[str, str] = {}  # value in the graph → parameter or buffer of this module

    def forward(self, images: Tensor) -> Tensor | dict[str, Tensor]:
        values: dict[str, Value] = {self.source: images, **self.host}
        values |= {value: fetch(self, path) for value, path in self.named.items()}
        for step in self.steps:
            inputs = tuple(values[name] if name else None for name in step.inputs)
            if step.layer is not None:
                values[step.outputs[0]] = self.get_submodule(step.layer)(inputs[0])
            else:
                values.update(zip(step.outputs, evaluate(step, inputs, self.opset), strict=False))
            for name in step.frees:
                del values[name]
        results = {name: _tensor(values[name]) for name in self.outputs}
        return next(iter(results.values())) if len(results) == 1 else results


def evaluate(step: Step, inputs: tuple[Value | None, ...], opset: int) -> tuple[Value, ...]:
    """The outputs of a step that is an operator."""
    result = OPS[step.op](Call(step.label, opset, step.attributes, inputs, len(step.outputs)))
    return result if isinstance(result, tuple) else (result,)


def with_frees(steps: Sequence[Step], keep: Sequence[str]) -> tuple[Step, ...]:
    """The steps, each freeing the values it is the last to read, so memory stays that of one block."""
    last = {name: index for index, step in enumerate(steps) for name in (*step.outputs, *step.inputs) if name}
    made = {name for step in steps for name in step.outputs}
    frees: dict[int, list[str]] = {}
    for name, index in last.items():
        if name in made and name not in keep:
            frees.setdefault(index, []).append(name)
    return tuple(replace(step, frees=tuple(frees.get(i, ()))) for i, step in enumerate(steps))


def fetch(module: nn.Module, path: str) -> Tensor:
    """A parameter or buffer by its full name."""
    owner, _, name = path.rpartition(".")
    tensor: Tensor = getattr(module.get_submodule(owner), name)
    return tensor


def _tensor(value: Value) -> Tensor:
    return value if isinstance(value, Tensor) else as_tensor(value)
