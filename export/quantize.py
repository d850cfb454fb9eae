"""Putting a QuantPlan into a Program as explicit quantise / dequantise pairs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

# Importing this module registers torch.ops.quantized_decomposed.
import torch.ao.quantization.fx._decomposed
from torch import Tensor
from torch.fx import Node

from vit_export.artifacts import Layer, LayerPlan, Program, QuantPlan, Range, TargetProfile
from vit_export.errors import UsageError
from vit_export.export.graph import Edit

_q = torch.ops.quantized_decomposed
_SMALLEST = float(torch.finfo(torch.float32).tiny) * 256  # scales below it lose their reciprocal


@dataclass(frozen=True, slots=True)
class QParams:
    """real = scale * (stored - zero_point); stored in [low, high] as `dtype`."""

    scale: float
    zero_point: int
    low: int
    high: int
    dtype: torch.dtype


def activation_qparams(seen: Range, profile: TargetProfile) -> QParams:
    """Per-tensor parameters whose grid contains zero exactly and covers `seen`.

    A range without extent (all zero, denormal) gives scale 1, which stores it as zero.
    """
    low, high = min(seen.low, 0.0), max(seen.high, 0.0)
    if profile.activations == "symmetric":
        scale = max(-low, high) / 127
        return QParams(scale if scale > _SMALLEST else 1.0, 0, -128, 127, torch.int8)
    scale = (high - low) / 255
    if scale <= _SMALLEST:
        return QParams(1.0, 0, 0, 255, torch.uint8)
    return QParams(scale, min(255, max(0, round(-low / scale))), 0, 255, torch.uint8)


def quantize_weight(weight: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Per-output-channel symmetric int8: (stored int8 like weight, scale float32 [out]).

    Codes lie in [-(2^(bits-1) - 1), 2^(bits-1) - 1]; a zero channel gets scale 1.
    """
    limit = 2 ** (bits - 1) - 1
    scale = weight.detach().abs().amax(dim=tuple(range(1, weight.ndim))).float() / limit
    scale = torch.where(scale > _SMALLEST, scale, torch.ones_like(scale))
    stored = torch.round(weight.detach() / scale.reshape(-1, *[1] * (weight.ndim - 1)))
    return stored.clamp_(-limit, limit).to(torch.int8), scale


def quantize(program: Program, plan: QuantPlan, profile: TargetProfile) -> Program:
    """The program with Q/DQ on the input and DQ on an int8 weight of each planned layer.

    Layers that read the same tensor with the same range share one pair. Runs in PyTorch, so the loss
    of quantisation alone can be measured. Raises UsageError for a plan of another model.
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
            _quantize_layer(edit, nodes[layer.node], layer, layer_plan, profile, shared)
    return replace(program, graph=edit.build())


def _quantize_layer(
    edit: Edit,
    node: Node,
    layer: Layer,
    plan: LayerPlan,
    profile: TargetProfile,
    shared: dict[tuple[Node, QParams], Node],
) -> None:
    if plan.input is None:
        raise UsageError(f"the plan quantises {plan.name} but has no input range for it")
    source, weight_node = node.args[0], node.args[1]
    assert isinstance(source, Node) and isinstance(weight_node, Node)
    params = activation_qparams(plan.input, profile)
    key = (source, params)
    if key not in shared:
        shared[key] = _fake_quantize(edit, source, params, node)
    weight = edit.tensors[layer.weight]
    if weight.dtype is torch.int8:  # a weight two layers share is stored once
        dequantized = next(u for u in weight_node.users if u.target is _q.dequantize_per_channel.default)
    else:
        dequantized = _store_weight(edit, weight_node, weight, plan, node)
    node.args = (shared[key], dequantized, *node.args[2:])


def _fake_quantize(edit: Edit, source: Node, p: QParams, before: Node) -> Node:
    first = source.next if source.op != "placeholder" else before
    arguments = (p.scale, p.zero_point, p.low, p.high, p.dtype)
    stored = edit.call(
        before if first.op == "output" else first, _q.quantize_per_tensor.default, source, *arguments
    )
    stored.meta = {k: v for k, v in before.meta.items() if k == "nn_module_stack"}
    with edit.graph.inserting_after(stored):
        restored = edit.graph.call_function(_q.dequantize_per_tensor.default, (stored, *arguments))
    restored.meta = dict(stored.meta)
    return restored


def _store_weight(edit: Edit, weight_node: Node, weight: Tensor, plan: LayerPlan, before: Node) -> Node:
    stored, scale = quantize_weight(weight, plan.weight_bits)
    limit = 2 ** (plan.weight_bits - 1) - 1
    edit.replace_tensor(weight_node, stored)
    name = str(weight_node.target)
    scale_node = edit.constant(f"{name}_scale", scale, before)
    zero_node = edit.constant(f"{name}_zero_point", torch.zeros(len(scale), dtype=torch.int64), before)
    with edit.graph.inserting_before(before):
        result = edit.graph.call_function(
            _q.dequantize_per_channel.default,
            (weight_node, scale_node, zero_node, 0, -limit, limit, torch.int8),
        )
    result.meta = {k: v for k, v in before.meta.items() if k == "nn_module_stack"}
    return result
