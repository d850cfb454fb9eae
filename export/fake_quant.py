"""A quantised program as PyTorch runs it fastest: what searches and stage blame evaluate."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule

from vit_export.artifacts import Program
from vit_export.export.graph import Edit
from vit_export.export.quantize import DEQUANTIZE, DEQUANTIZE_CHANNEL, QUANTIZE

_FAKE = torch.ops.aten.fake_quantize_per_tensor_affine.default


def fake_quantized(program: Program) -> GraphModule:
    """The graph with each Q/DQ pair as one kernel and each stored weight as the float32 it stands for.

    Equal to the Q/DQ graph except for values within a rounding error of a tie.
    """
    edit = Edit.of(program.graph)
    for node in edit.nodes(DEQUANTIZE):
        stored = node.args[0]
        if stored.op == "call_function" and stored.target is QUANTIZE:  # type: ignore[union-attr]
            source, scale, zero_point, low, high, _ = stored.args  # type: ignore[union-attr]
            edit.bypass(node, edit.call(node, _FAKE, source, scale, zero_point, low, high))
    for node in edit.nodes(DEQUANTIZE_CHANNEL):
        codes, scale = (edit.tensor(argument) for argument in node.args[:2])
        if codes is not None and scale is not None:
            edit.bypass(node, edit.constant(f"{node.args[0].target}.restored", restored(codes, scale), node))  # type: ignore[union-attr]
    return edit.build()


def restored(codes: Tensor, scale: Tensor) -> Tensor:
    """float32 weights [out, ...] from int8 codes and a scale [out]."""
    return codes.float() * scale.reshape(-1, *[1] * (codes.ndim - 1))
