"""float32 to float16 for a whole ONNX graph, except where float16 cannot hold the numbers.

Inputs and outputs stay float32, with a Cast at the border. A node stays float32 (an island between
Casts) when a tensor it reads or writes comes near the largest float16, when it sums squares that do,
or when a constant it needs would vanish. Q/DQ scales become float16 too, so that a runtime can fuse
a DequantizeLinear with the product behind it (opset 19 and later).

What a strongly typed TensorRT network needs, and what `--fp16` means for ONNX Runtime.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from vit_export.errors import TargetError, UnsupportedOperator
from vit_export.export.float16_rewrite import FLOAT, HALF_MAX, HalfRewrite
from vit_export.export.float16_scales import round_scales

HALF_TINY = 2.0**-24  # the smallest float16 above 0
HEADROOM = 2.0  # unseen images may go so many times higher than those measured

# Operators whose sum, or sum of squares, overflows before their inputs do.
_SUMS = ("ReduceSum", "ReduceMean", "ReduceL1", "GlobalAveragePool")
_SQUARES = ("LayerNormalization", "InstanceNormalization", "GroupNormalization", "ReduceL2")
_SUBGRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
# Operators for which a constant beyond float16 means "no limit" or "masked".
_SATURATING = ("Add", "Where", "Clip", "Max", "Min")


@dataclass(frozen=True, slots=True)
class HalfReport:
    """What was not a plain conversion. kept: node name → why it stays float32. saturated: constants
    whose values beyond ±65504 became ±65504 (masks, limits)."""

    kept: Mapping[str, str]
    saturated: tuple[str, ...]


def to_float16(
    model: ir.Model, peaks: Mapping[str, float] | None = None, keep: Sequence[str] = ()
) -> HalfReport:
    """Convert `model` in place and say what stayed float32.

    peaks: max |x| by tensor name (measure_peaks). Without it every normalisation stays float32
    and no other overflow is foreseen. keep: globs over node names and their module paths.
    Raises UnsupportedOperator for control flow, TargetError for Q/DQ below opset 19.
    """
    _check(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True)(model)
    if any(value.dtype is None for node in model.graph for value in node.outputs):
        common.ShapeInferencePass()(model)
    round_scales(model)
    kept = dict(_islands(model.graph, peaks, keep))
    kept |= _quantizers_of(kept)
    saturated = HalfRewrite(model.graph, set(kept)).run()
    common.RemoveUnusedNodesPass()(model)
    return HalfReport({node.name or node.op_type: reason for node, reason in kept.items()}, saturated)


def _check(model: ir.Model) -> None:
    quantized = any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph)
    opset = model.graph.opset_imports.get("", 0)
    if quantized and opset < 19:
        raise TargetError(
            f"float16 scales need opset 19, the graph has {opset}", "export with --opset 20 or later"
        )
    for node in model.graph:
        if any(attribute.type in _SUBGRAPHS for attribute in node.attributes.values()):
            raise UnsupportedOperator(
                f"{node.name} ({node.op_type}) has a subgraph",
                "float16 conversion takes straight-line graphs; try --fp32",
            )


def _islands(
    graph: ir.Graph, peaks: Mapping[str, float] | None, keep: Sequence[str]
) -> Iterator[tuple[ir.Node, str]]:
    """Every node that must stay float32, with the reason."""
    for node in graph:
        reason = _asked(node, keep) or _range_reason(node, peaks) or _constant_reason(node)
        if reason:
            yield node, reason


def _asked(node: ir.Node, keep: Sequence[str]) -> str:
    """Whether a glob of the user's names the node (`blocks.3.attn.proj/MatMul`) or its module."""
    name = node.name or ""
    names = (name, name.rpartition("/")[0])
    return next((f"asked for by {p}" for p in keep if any(fnmatch.fnmatch(n, p) for n in names)), "")


def _range_reason(node: ir.Node, peaks: Mapping[str, float] | None) -> str:
    """Why the ranges forbid float16: a tensor too large, or a sum or square of it."""
    if peaks is None:
        return "no ranges were measured" if node.op_type in _SQUARES else ""
    limit = HALF_MAX / HEADROOM
    for value in (*node.inputs, *node.outputs):
        peak = peaks.get(value.name or "", 0.0) if value is not None else 0.0
        if peak > limit:
            return f"{value.name} reaches {peak:.3g}" if value is not None else ""
    peak = peaks.get(node.inputs[0].name or "", 0.0) if node.inputs and node.inputs[0] else 0.0
    if node.op_type in _SQUARES and peak * peak > limit:
        return f"squares of its input reach {peak * peak:.3g}"
    if node.op_type in _SUMS and peak * _reduced(node) > limit:
        return f"its sum may reach {peak * _reduced(node):.3g}"
    return ""


def _reduced(node: ir.Node) -> int:
    """How many numbers a reduction adds up for one of its outputs, 1 where shapes do not say."""
    before, after = (_elements(v) for v in (node.inputs[0], node.outputs[0]))
    return max(1, before // after) if before and after else 1


def _elements(value: ir.Value | None) -> int:
    """Elements of one image: symbolic dimensions (the batch) count as one."""
    if value is None or value.shape is None:
        return 0
    return math.prod(dim for dim in value.shape if isinstance(dim, int))


def _constant_reason(node: ir.Node) -> str:
    """Why a constant forbids float16: a scalar that would become 0, or a weight out of range."""
    for value in node.inputs:
        if value is None or value.dtype != FLOAT or value.const_value is None:
            continue
        data = np.abs(value.const_value.numpy())
        finite = data[np.isfinite(data)]
        if data.size == 1 and 0 < data.item() < HALF_TINY:
            return f"{value.name} = {data.item():.3g} is 0 in float16"
        if finite.size and finite.max() > HALF_MAX and node.op_type not in _SATURATING:
            return f"{value.name} reaches {finite.max():.3g}"
    return ""


def _quantizers_of(kept: Mapping[ir.Node, str]) -> dict[ir.Node, str]:
    """Q and DQ around kept products, and the products that share them: one scale type for each product."""
    found: dict[ir.Node, str] = {}
    todo = [node for node in kept if _dequantizers(node)]
    while todo:
        product = todo.pop()
        for dequantize in _dequantizers(product):
            group = [dequantize]
            quantize = dequantize.inputs[0].producer() if dequantize.inputs[0] is not None else None
            group += [quantize] if quantize is not None and quantize.op_type == "QuantizeLinear" else []
            for node in group:
                found.setdefault(node, f"its product {product.name} stays float32")
            for user in dequantize.outputs[0].consumers():
                if user not in kept and user not in found and len(_dequantizers(user)) > 1:
                    found[user] = f"shares its int8 input with {product.name}"
                    todo.append(user)
    return {node: reason for node, reason in found.items() if node not in kept}


def _dequantizers(node: ir.Node) -> list[ir.Node]:
    sources = [value.producer() for value in node.inputs if value is not None]
    return [s for s in sources if s is not None and s.op_type == "DequantizeLinear"]
