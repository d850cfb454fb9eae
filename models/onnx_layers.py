"""nn.Linear and convolutions from ONNX nodes with constant weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

from torch import Tensor, nn
from torch.nn import functional

from vit_export.errors import UnsupportedOperator
from vit_export.models.onnx_call import Value, as_tensor
from vit_export.models.onnx_module import Step

Constants: TypeAlias = Mapping[str, Value]


class Padded(nn.Module):
    """A convolution whose two sides are padded differently."""

    def __init__(self, pads: list[int], conv: nn.Module) -> None:
        super().__init__()
        self.pads = pads
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        padded: Tensor = self.conv(functional.pad(x, self.pads))
        return padded


def matrix(step: Step, constants: Constants) -> Tensor | None:
    """The constant [K, N] matrix that a MatMul multiplies with, None for a product of two activations."""
    weight = constants.get(step.inputs[1]) if step.op == "MatMul" else None
    return weight if isinstance(weight, Tensor) and weight.ndim == 2 else None


def _from_matmul(step: Step, constants: Constants) -> nn.Module | None:
    weight = matrix(step, constants)
    return None if weight is None else _linear(weight.T, _bias(step, constants))


def _from_gemm(step: Step, constants: Constants) -> nn.Module | None:
    weight, bias, given = constants.get(step.inputs[1]), _bias(step, constants), step.attributes
    plain = given.get("alpha", 1.0) == 1.0 and given.get("beta", 1.0) == 1.0 and not given.get("transA", 0)
    moving = len(step.inputs) > 2 and bool(step.inputs[2]) and bias is None
    if not isinstance(weight, Tensor) or not plain or moving:
        return None
    rows = weight if given.get("transB", 0) else weight.T
    return _linear(rows, bias) if bias is None or bias.numel() == rows.shape[0] else None


def _from_conv(step: Step, constants: Constants) -> nn.Module:
    weight, bias, given = constants.get(step.inputs[1]), _bias(step, constants), step.attributes
    if not isinstance(weight, Tensor) or given.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise UnsupportedOperator(f"{step.label} cannot be imported: its weight or padding is not constant")
    spatial = weight.ndim - 2
    ones, pads = [1] * spatial, list(given.get("pads", [0] * 2 * spatial))
    before, after = pads[:spatial], pads[spatial:]
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[spatial]
    layer = kind(
        weight.shape[1] * given.get("group", 1),
        weight.shape[0],
        tuple(weight.shape[2:]),  # type: ignore[arg-type]
        stride=tuple(given.get("strides", ones)),  # type: ignore[arg-type]
        padding=tuple(before if before == after else [0] * spatial),  # type: ignore[arg-type]
        dilation=tuple(given.get("dilations", ones)),  # type: ignore[arg-type]
        groups=given.get("group", 1),
        bias=bias is not None,
        device="meta",
    )
    filled = _fill(layer, weight, bias)
    if before == after:
        return filled
    return Padded([p for pair in zip(reversed(before), reversed(after), strict=True) for p in pair], filled)


def _from_conv_transpose(step: Step, constants: Constants) -> nn.Module:
    weight, bias, given = constants.get(step.inputs[1]), _bias(step, constants), step.attributes
    pads = list(given.get("pads", [0, 0, 0, 0]))
    usual = pads[:2] == pads[2:] and "output_shape" not in given and "auto_pad" not in given
    if not isinstance(weight, Tensor) or weight.ndim != 4 or not usual:
        raise UnsupportedOperator(f"{step.label} cannot be imported: its weight or padding is not constant")
    layer = nn.ConvTranspose2d(
        weight.shape[0],
        weight.shape[1] * given.get("group", 1),
        (weight.shape[2], weight.shape[3]),
        stride=tuple(given.get("strides", [1, 1])),
        padding=tuple(pads[:2]),
        output_padding=tuple(given.get("output_padding", [0, 0])),
        dilation=tuple(given.get("dilations", [1, 1])),
        groups=given.get("group", 1),
        bias=bias is not None,
        device="meta",
    )
    return _fill(layer, weight, bias)


LAYERS: Mapping[str, Callable[[Step, Constants], nn.Module | None]] = {
    "MatMul": _from_matmul,
    "Gemm": _from_gemm,
    "Conv": _from_conv,
    "ConvTranspose": _from_conv_transpose,
}


def _bias(step: Step, constants: Constants) -> Tensor | None:
    value = constants.get(step.inputs[2]) if len(step.inputs) > 2 else None
    return value if isinstance(value, Tensor) or value is None else as_tensor(value)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Module:
    return _fill(nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta"), weight, bias)


def _fill(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.reshape(-1), requires_grad=False)
    return layer
