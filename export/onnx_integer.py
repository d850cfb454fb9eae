"""Quantised linears as the runtimes' fastest operators see them; each rewrite keeps the graph's numbers.

Measured on DINOv2-S (docs/performance.md): without `drop_zero_points` OpenVINO 2026.4 ran half of the
linears in float; ONNX Runtime 1.32 makes MatMulIntegerToFloat out of Q/DQ by itself, but leaves the bias
to an Add of its own and copies queries, keys and values, which `integer_products` and
`integer_attention` spare it. SkipLayerNormalization was slower than Add and LayerNormalization.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isclose, sqrt

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from vit_export.export.onnx_edit import add_initializer, constant, only_user
from vit_export.export.onnx_passes import remove_unused

CONTRIB = "com.microsoft"
_PRODUCT = "MatMulIntegerToFloat"
_A, _B, _A_SCALE, _B_SCALE, _A_ZERO, _B_ZERO, _BIAS = range(7)  # inputs of MatMulIntegerToFloat


def drop_zero_points(model: ir.Model) -> None:
    """A weight's zero points that are all zero are the operator's default: leave them out.

    The exporter shares one array of zeros among weights of the same width. OpenVINO then folds only the
    first of them and multiplies the others in float.
    """
    for node in model.graph:
        if node.op_type != "DequantizeLinear" or len(node.inputs) < 3:
            continue
        stored, zero = constant(node.inputs[0]), constant(node.inputs[2])
        if stored is not None and stored.dtype == np.int8 and zero is not None and not zero.any():
            node.resize_inputs(2)


def integer_products(model: ir.Model) -> int:
    """Write each quantised linear as one com.microsoft.MatMulIntegerToFloat with its bias; how many."""
    count = 0
    for node in list(model.graph):
        if node.op_type != "MatMul" or node.domain:
            continue
        left, right = (_dequantize(value) for value in node.inputs)
        stored = constant(right.inputs[0]) if right is not None else None
        if left is None or right is None or stored is None or stored.ndim != 2 or _is_constant(left):
            continue
        bias, last = added_bias(model, node, stored.shape[1])
        inputs = [left.inputs[0], right.inputs[0], left.inputs[1], right.inputs[1]]
        inputs += [_optional(left, 2), _optional(right, 2), bias]
        put(last, ir.node(_PRODUCT, inputs, domain=CONTRIB))
        count += 1
    return done(model, count)


def integer_attention(model: ir.Model) -> int:
    """Products of queries, keys and values with the Attention that alone reads them become QAttention.

    For attention over its own tokens without mask or bias, after `integer_products`; queries, keys and
    values from one linear or from three that read the same tensor. How many products went into one.
    """
    count = 0
    for node in list(model.graph):
        joined = _joined(model, node) if node.op_type == "Attention" and not node.domain else None
        if joined is None:
            continue
        inputs = [joined.source, joined.weight, joined.bias, joined.scale, joined.weight_scale, None]
        attributes = {"num_heads": node.attributes.get_int("q_num_heads", 0)}
        put(node, ir.node("QAttention", [*inputs, joined.zero], attributes, domain=CONTRIB))
        count += joined.products
    return done(model, count)


@dataclass(frozen=True, slots=True)
class _Joined:
    """Queries, keys and values as one quantised product: weight int8 [C, 3C]."""

    source: ir.Value
    scale: ir.Value
    zero: ir.Value | None
    weight: ir.Value
    weight_scale: ir.Value
    bias: ir.Value
    products: int


def _joined(model: ir.Model, node: ir.Node) -> _Joined | None:
    products = _products(node) if _plain(node) else ()
    if not products or any(_optional(p, _B_ZERO) is not None for p in products):
        return None
    first = products[0]
    if any(p.inputs[i] is not first.inputs[i] for p in products for i in (_A, _A_SCALE, _A_ZERO)):
        return None
    weights = [_array(p.inputs[_B]) for p in products]
    if {w.shape[1] for w in weights} != {weights[0].shape[0] * 3 // len(products)}:
        return None  # QAttention knows only heads that together are as wide as the tokens
    biases = [_row(_optional(p, _BIAS), w.shape[1]) for p, w in zip(products, weights, strict=True)]
    scales = [_row(p.inputs[_B_SCALE], w.shape[1]) for p, w in zip(products, weights, strict=True)]
    source, scale = first.inputs[_A], first.inputs[_A_SCALE]
    assert source is not None and scale is not None
    stem = (node.name or "").rpartition("/")[0] + ".qkv_joined"
    return _Joined(
        source, scale, first.inputs[_A_ZERO],
        _side_by_side(model, f"{stem}.weight", weights),
        _side_by_side(model, f"{stem}.scale", scales),
        _side_by_side(model, f"{stem}.bias", biases),
        len(products),
    )  # fmt: skip


def _plain(node: ir.Node) -> bool:
    """Attention over [B, N, C] without mask, cache, caps or a scale of its own."""
    if any(value is not None for value in node.inputs[3:]) or len(node.outputs) != 1:
        return False
    heads, keys = (node.attributes.get_int(f"{which}_num_heads", 0) for which in ("q", "kv"))
    shape = node.outputs[0].shape
    width = shape[-1] if shape is not None else None
    if not heads or heads != keys or not isinstance(width, int) or node.attributes.get_int("is_causal", 0):
        return False
    usual = 1 / sqrt(width / heads)
    own = node.attributes.get_float("scale", usual)
    return isclose(own, usual, rel_tol=1e-5) and not node.attributes.get_float("softcap", 0.0)


def _products(node: ir.Node) -> Sequence[ir.Node]:
    """The integer products behind queries, keys and values: one through Split, or three; else none."""
    makers = [value.producer() if value is not None else None for value in node.inputs[:3]]
    if any(maker is None for maker in makers):
        return ()
    first = makers[0]
    assert first is not None
    if first.op_type == "Split" and all(v is o for v, o in zip(node.inputs[:3], first.outputs, strict=False)):
        value = first.inputs[0]
        makers = [value.producer() if value is not None and only_user(value) is first else None]
    elif any(only_user(value) is not node for value in node.inputs[:3] if value is not None):
        return ()
    found = [maker for maker in makers if maker is not None and maker.op_type == _PRODUCT]
    return found if len(found) == len(makers) else ()


def added_bias(model: ir.Model, product: ir.Node, width: int) -> tuple[ir.Value | None, ir.Node]:
    """(bias, last node of the linear): an added constant [width], or a subtracted one turned round."""
    out = product.outputs[0]
    add = only_user(out)
    if add is None or not (add.op_type == "Add" or (add.op_type == "Sub" and add.inputs[0] is out)):
        return None, product
    other = add.inputs[1] if add.inputs[0] is out else add.inputs[0]
    stored = constant(other)
    if other is None or stored is None or stored.shape != (width,):
        return None, product
    if add.op_type == "Add":
        return other, add
    return _initializer(model, f"{other.name}.positive", np.negative(stored)), add


def _dequantize(value: ir.Value | None) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def _is_constant(node: ir.Node) -> bool:
    return constant(node.inputs[0]) is not None


def _optional(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if len(node.inputs) > index else None


def put(old: ir.Node, node: ir.Node) -> None:
    """Let a node take the place of another, under its module's name; an output of the graph keeps its own."""
    before, out = old.outputs[0], node.outputs[0]
    assert old.graph is not None
    path = (old.name or "").rpartition("/")[0]
    stem = f"{path}/{node.op_type}" if path else f"{old.name}/{node.op_type}"
    taken = {other.name for other in old.graph}
    numbered = (f"{stem}_{count}" for count in range(2, len(taken) + 3))
    node.name = stem if stem not in taken else next(name for name in numbered if name not in taken)
    old.graph.insert_before(old, node)
    kept = before.name if before.is_graph_output() else f"{node.name}:0"
    out.shape, out.type = before.shape, before.type
    before.replace_all_uses_with(out, replace_graph_outputs=True)
    before.name, out.name = f"{before.name}.replaced", kept


def done(model: ir.Model, count: int) -> int:
    if count:
        model.opset_imports[CONTRIB] = 1
        remove_unused(model)
    return count


def _row(value: ir.Value | None, width: int) -> npt.NDArray[np.generic]:
    """A constant as [width]; zeros for none."""
    return np.broadcast_to(np.float32(0) if value is None else _array(value), (width,))


def _side_by_side(model: ir.Model, name: str, parts: Sequence[npt.NDArray[np.generic]]) -> ir.Value:
    return _initializer(model, name, np.ascontiguousarray(np.concatenate(parts, axis=-1)))


def _initializer(model: ir.Model, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
    known = model.graph.initializers.get(name)
    return known if known is not None else add_initializer(model, name, array)


def _array(value: ir.Value | None) -> npt.NDArray[np.generic]:
    array = constant(value)
    assert array is not None
    return array
