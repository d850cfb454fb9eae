"""Putting a QuantPlan into a Program as explicit quantise / dequantise pairs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

# Importing this module registers torch.ops.quantized_decomposed.
import torch.ao.quantization.fx._decomposed
from torch import Tensor
from torch.fx import Node

from vit_export.artifacts import Layer, LayerPlan, Program, QuantPlan, Range, TargetProfile
from vit_export.errors import UsageError
from vit_export.export.bias import change_bias
from vit_export.export.graph import Edit, aten

QUANTIZE = torch.ops.quantized_decomposed.quantize_per_tensor.default
DEQUANTIZE = torch.ops.quantized_decomposed.dequantize_per_tensor.default
DEQUANTIZE_CHANNEL = torch.ops.quantized_decomposed.dequantize_per_channel.default
_WORTH = 0.9  # a shift costs one operator: it must spare a tenth of the range
_SMALLEST = float(torch.finfo(torch.float32).tiny) * 256  # scales below it lose their reciprocal


@dataclass(frozen=True, slots=True)
class QParams:
    """real = scale * (stored - zero_point) + shift; stored in [low, high] as `dtype`.

    shift: subtracted in front of the quantiser; W shift joins the layer's bias.
    """

    scale: float
    zero_point: int
    low: int
    high: int
    dtype: torch.dtype
    shift: float = 0.0


def activation_qparams(seen: Range, profile: TargetProfile, *, centre: bool = False) -> QParams:
    """Per-tensor parameters whose grid covers `seen`; without a shift it contains zero exactly.

    A range without extent (all zero, denormal) gives scale 1, which stores it as zero. centre: let a
    one-sided range (after GELU, say) be shifted to its middle where the target has no zero point; half of
    the codes would be wasted otherwise. Asymmetric targets never need it.
    """
    low, high = min(seen.low, 0.0), max(seen.high, 0.0)
    if profile.activations == "symmetric":
        reach, shift = max(-low, high), 0.0
        if centre and (high - low) / 2 < _WORTH * reach:
            reach, shift = (high - low) / 2, float(np.float16((low + high) / 2))  # exact in half precision
            reach += abs(shift - (low + high) / 2)
        scale = reach / 127
        if scale <= _SMALLEST:
            return QParams(1.0, 0, -128, 127, torch.int8)
        return QParams(scale, 0, -128, 127, torch.int8, shift)
    scale = (high - low) / 255
    if scale <= _SMALLEST:
        return QParams(1.0, 0, 0, 255, torch.uint8)
    return QParams(scale, min(255, max(0, round(-low / scale))), 0, 255, torch.uint8)


def weight_scale(weight: Tensor, bits: int = 8, group: int = 0) -> Tensor:
    """float32 [out]: the largest magnitude of each output channel over the largest code; 1 for a zero one.

    group: float32 [out, in / group], one for so many neighbouring columns of a [out, in] weight.
    """
    limit = 2 ** (bits - 1) - 1
    rows = weight.detach().flatten(1)
    parts = rows.reshape(len(rows), -1, group) if group else rows
    scale = parts.abs().amax(dim=-1).float() / limit
    return torch.where(scale > _SMALLEST, scale, torch.ones_like(scale))


def quantize_weight(
    weight: Tensor, bits: int = 8, scale: Tensor | None = None, group: int = 0
) -> tuple[Tensor, Tensor]:
    """Per-output-channel (or group) symmetric int8: (stored int8, scale float32 [rows of stored]).

    stored is like weight; [out * groups, group] for groups. Codes lie in [-(2^(bits-1) - 1),
    2^(bits-1) - 1]. scale: `weight_scale` of the weight if not given.
    """
    limit = 2 ** (bits - 1) - 1
    scale = (weight_scale(weight, bits, group) if scale is None else scale).flatten()
    rows = weight.detach().reshape(-1, group) if group else weight.detach()
    stored = torch.round(rows / scale.reshape(-1, *[1] * (rows.ndim - 1)))
    return stored.clamp_(-limit, limit).to(torch.int8), scale


def quantize(program: Program, plan: QuantPlan, profile: TargetProfile) -> Program:
    """The program with Q/DQ on the input and DQ on an int8 weight of each planned layer.

    Layers that read the same tensor with the same range share one pair; a plan for weights only has none.
    Runs in PyTorch, so the loss of quantisation alone can be measured. Raises UsageError for a plan of
    another model.
    """
    by_name = {layer.name: layer for layer in program.layers}
    unknown = [p.name for p in plan.layers if p.name not in by_name]
    if unknown:
        raise UsageError(f"the plan names layers this model does not have: {', '.join(unknown[:5])}")
    edit = Edit.of(program.graph)
    nodes = {node.name: node for node in edit.graph.nodes}
    shared: dict[tuple[Node, QParams], Node] = {}
    for layer_plan in plan.layers:
        layer = by_name[layer_plan.name]
        if layer_plan.quantized and not (layer.kind == "conv" and profile.convolutions == "float"):
            node = nodes[layer.node]
            if plan.weights_only:
                node.update_arg(1, _quantize_weight(program, edit, node, layer, layer_plan))
            else:
                by_name[layer.name] = _quantize_layer(program, edit, node, layer, layer_plan, profile, shared)
    return replace(program, graph=edit.build(), layers=tuple(by_name.values()))


def _quantize_layer(
    program: Program,
    edit: Edit,
    node: Node,
    layer: Layer,
    plan: LayerPlan,
    profile: TargetProfile,
    shared: dict[tuple[Node, QParams], Node],
) -> Layer:
    if plan.input is None:
        raise UsageError(f"the plan quantises {plan.name} but has no input range for it")
    source = node.args[0]
    assert isinstance(source, Node)
    params = activation_qparams(plan.input, profile, centre=layer.kind == "linear")
    key = (source, params)
    if key not in shared:
        shared[key] = _fake_quantize(edit, source, params, node)
    dequantized = _quantize_weight(program, edit, node, layer, plan)
    node.args = (shared[key], dequantized, *node.args[2:])
    if params.shift:
        stored, scales = (edit.tensors[str(a.target)] for a in dequantized.args[:2])  # type: ignore[union-attr]
        rows = stored.sum(1, dtype=torch.float64) * scales
        return change_bias(edit, node, layer, lambda bias: (bias + rows * params.shift).float())
    return layer


def _quantize_weight(program: Program, edit: Edit, node: Node, layer: Layer, plan: LayerPlan) -> Node:
    """The layer's weight as stored codes; the node that gives it back in float."""
    weight_node, weight = node.args[1], edit.tensors[layer.weight]
    assert isinstance(weight_node, Node)
    if weight.dtype is torch.int8:  # a weight two layers share is stored once
        return next(_whole(u) for u in weight_node.users if u.target is DEQUANTIZE_CHANNEL)
    codes = quantize_weight(weight, plan.weight_bits, program.weight_scales.get(layer.weight), plan.group)
    dequantized = _store_weight(edit, weight_node, plan, node, codes)
    if plan.group:
        return edit.call(node, aten.reshape.default, dequantized, list(layer.shape))
    return dequantized


def _whole(dequantized: Node) -> Node:
    """What gives a stored weight its own shape: the dequantisation, or the reshape of its groups."""
    return next((u for u in dequantized.users if u.target is aten.reshape.default), dequantized)


def _fake_quantize(edit: Edit, source: Node, p: QParams, before: Node) -> Node:
    first = source.next if source.op != "placeholder" else before
    first = before if first.op == "output" else first
    arguments = (p.scale, p.zero_point, p.low, p.high, p.dtype)
    meta = {k: v for k, v in before.meta.items() if k == "nn_module_stack"}
    meta |= {k: v for k, v in source.meta.items() if k == "val"}
    if p.shift:
        source = edit.call(first, aten.sub.Tensor, source, p.shift)
        source.meta = dict(meta)
    stored = edit.call(first, QUANTIZE, source, *arguments)
    stored.meta = {k: v.to(p.dtype) if k == "val" else v for k, v in meta.items()}
    with edit.graph.inserting_after(stored):
        restored = edit.graph.call_function(DEQUANTIZE, (stored, *arguments))
    restored.meta = meta
    return restored


def _store_weight(
    edit: Edit, weight_node: Node, plan: LayerPlan, before: Node, codes: tuple[Tensor, Tensor]
) -> Node:
    stored, scale = codes
    limit = 2 ** (plan.weight_bits - 1) - 1
    edit.replace_tensor(weight_node, stored)
    name = str(weight_node.target)
    scale_node = edit.constant(f"{name}_scale", scale, before)
    zero_node = edit.constant(f"{name}_zero_point", torch.zeros(len(scale), dtype=torch.int64), before)
    with edit.graph.inserting_before(before):
        result = edit.graph.call_function(
            DEQUANTIZE_CHANNEL,
            (weight_node, scale_node, zero_node, 0, -limit, limit, torch.int8),
        )
    result.meta = {k: v for k, v in before.meta.items() if k == "nn_module_stack"}
    return result
