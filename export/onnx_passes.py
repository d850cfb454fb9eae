"""Rewrites of an exported ONNX graph; each keeps its numbers. Run in PASSES' order.

Shapes in comments: B batch, N tokens, H heads, D channels a head, C = H * D.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common

from vit_export.export.onnx_edit import add_initializer, constant, ints, like, only_user, replace
from vit_export.export.onnx_layout import transpose_images

_SCOPES = "pkg.torch.onnx.name_scopes"


def split_quantized_gemm(model: ir.Model) -> None:
    """Gemm with a dequantised weight becomes MatMul and Sub of the negated bias.

    ONNX Runtime takes a Gemm to integers only when its bias is quantised too, which TensorRT refuses;
    and it joins a two-dimensional MatMul and Add to a Gemm before it looks for integers.
    """
    for node in list(model.graph):
        weight = node.inputs[1].producer() if node.op_type == "Gemm" and node.inputs[1] else None
        if weight is not None and weight.op_type == "Reshape" and weight.inputs[0] is not None:
            weight = weight.inputs[0].producer()  # four-bit codes in groups
        if weight is None or weight.op_type != "DequantizeLinear":
            continue
        settings = {n: node.attributes.get_float(n, 1.0) for n in ("alpha", "beta")}
        if node.attributes.get_int("transA", 0) or set(settings.values()) != {1.0}:
            continue
        if len(node.inputs) > 2 and node.inputs[2] is not None and constant(node.inputs[2]) is None:
            continue
        right = node.inputs[1]
        if node.attributes.get_int("transB", 0):
            turn = like(node, "Transpose", [right], {"perm": [1, 0]})
            right = turn.outputs[0]
        product = like(node, "MatMul", [node.inputs[0], right]).outputs[0]
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        stored = constant(bias)
        if bias is not None and stored is not None:
            product.type = node.outputs[0].type
            product = like(node, "Sub", [product, _negated(model, bias, stored)]).outputs[0]
        replace(node, product)


def _negated(model: ir.Model, value: ir.Value, stored: npt.NDArray[np.generic]) -> ir.Value:
    name = f"{value.name}.negative"
    known = model.graph.initializers.get(name)
    return known if known is not None else add_initializer(model, name, np.negative(stored))


def fold_weight_transposes(model: ir.Model) -> None:
    """DequantizeLinear(W) → Transpose becomes DequantizeLinear(Wᵀ) with the axis moved.

    ONNX Runtime fuses the pattern to an integer product only without the Transpose in between.
    """
    graph = model.graph
    for node in list(graph):
        source = node.inputs[0].producer() if node.op_type == "Transpose" and node.inputs[0] else None
        if source is None or source.op_type != "DequantizeLinear":
            continue
        stored = constant(source.inputs[0])
        if stored is None or stored.ndim != 2:
            continue
        weight = source.inputs[0]
        assert weight is not None and weight.name is not None
        name = f"{weight.name}.T"
        if name not in graph.initializers:
            add_initializer(model, name, np.ascontiguousarray(stored.T))
        axis = 1 - (source.attributes.get_int("axis", 1) or 0)
        turned = like(
            node, "DequantizeLinear", [graph.initializers[name], *source.inputs[1:]], {"axis": axis}
        )
        replace(node, turned.outputs[0])


def merge_heads(model: ir.Model) -> None:
    """Let Attention split heads itself: it takes [B, N, C] as well as [B, H, N, D].

    Removes the Reshape and Transpose (and Slice, Squeeze for a joined qkv) around each Attention. Queries
    that are cut out of all tokens, behind the heads, are cut before them.
    """
    for node in list(model.graph):
        if node.op_type != "Attention" or len(node.outputs) != 1:
            continue
        merged = _merged_output(node)
        cut = _cut_tokens(node.inputs[0])
        queries = node.inputs[0] if cut is None else cut.inputs[0]
        sources = [_head_source(value) for value in (queries, *node.inputs[1:3])]
        if merged is None or any(source is None for source in sources):
            continue
        heads = {source[1] for source in sources if source is not None}
        values = [source[0] for source in sources if source is not None]
        joined = [source[2] for source in sources if source is not None]
        if len(heads) != 1:
            continue
        if all(value is values[0] for value in values) and joined == [0, 1, 2]:
            values = list(_split(node, values[0], 3))
        elif values[1] is values[2] and joined == [None, 0, 1]:  # of fewer tokens, in PVT
            values[1:] = _split(node, values[1], 2)
        elif joined != [None, None, None]:
            continue
        if cut is not None:
            values[0] = _cut_before_heads(model, node, cut, values[0])
        for index, value in enumerate(values):
            node.replace_input_with(index, value)
        count = heads.pop()
        node.attributes.add(ir.AttrInt64("q_num_heads", count))
        node.attributes.add(ir.AttrInt64("kv_num_heads", count))
        node.outputs[0].shape = merged.shape
        merged.replace_all_uses_with(node.outputs[0], replace_graph_outputs=True)


def _split(node: ir.Node, value: ir.Value, parts: int) -> Sequence[ir.Value]:
    """`value` cut into equal parts on its last axis, before `node`."""
    made = ir.node("Split", [value], attributes={"axis": -1, "num_outputs": parts}, num_outputs=parts)
    made.metadata_props.update(node.metadata_props)
    assert node.graph is not None
    node.graph.insert_before(node, made)
    return list(made.outputs)


def _cut_tokens(value: ir.Value | None) -> ir.Node | None:
    """The Slice that takes some tokens of [B, H, N, D], if it makes `value`."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == "Slice" and ints(node, 3) == [2] else None


def _cut_before_heads(model: ir.Model, node: ir.Node, cut: ir.Node, value: ir.Value) -> ir.Value:
    """The same tokens of [B, N, C], in front of an Attention."""
    name = "axis_of_tokens"
    axis = model.graph.initializers.get(name) or add_initializer(model, name, np.array([1], np.int64))
    return like(node, "Slice", [value, *cut.inputs[1:3], axis]).outputs[0]


def _head_source(value: ir.Value | None) -> tuple[ir.Value, int, int | None] | None:
    """What is split into heads to give `value`: (tensor [B, N, C, 2C or 3C], heads, part of joined ones)."""
    node = value.producer() if value is not None else None
    part: int | None = None
    if node is not None and node.op_type == "Squeeze" and ints(node, 1) == [0]:
        node = node.inputs[0].producer() if node.inputs[0] else None
        if node is None or node.op_type != "Slice" or ints(node, 3) != [0]:
            return None
        part = (ints(node, 1) or [-1])[0]
        node = node.inputs[0].producer() if node.inputs[0] else None
    if node is None or node.op_type != "Transpose":
        return None
    wanted = [0, 2, 1, 3] if part is None else [2, 0, 3, 1, 4]
    if list(node.attributes.get_ints("perm", ())) != wanted:
        return None
    reshape = node.inputs[0].producer() if node.inputs[0] else None
    if reshape is None or reshape.op_type != "Reshape" or reshape.inputs[0] is None:
        return None
    shape = reshape.outputs[0].shape
    heads = shape[2 if part is None else 3] if shape is not None else None
    return (reshape.inputs[0], heads, part) if isinstance(heads, int) else None


def _merged_output(node: ir.Node) -> ir.Value | None:
    """The [B, N, C] value made from an Attention's [B, H, N, D] by one Transpose and one Reshape."""
    transpose = only_user(node.outputs[0])
    if transpose is None or transpose.op_type != "Transpose":
        return None
    reshape = only_user(transpose.outputs[0])
    if reshape is None or reshape.op_type != "Reshape":
        return None
    shape = reshape.outputs[0].shape
    return reshape.outputs[0] if shape is not None and len(shape) == 3 else None


def name_batch(model: ir.Model) -> None:
    """Call the free batch `batch` wherever it stands (`16*batch` are its windows), not `s77`."""
    shape = model.graph.inputs[0].shape
    first = shape[0] if shape is not None else None
    if not isinstance(first, ir.SymbolicDim) or first.value is None:
        return
    symbol = re.compile(rf"\b{re.escape(first.value)}\b")
    values = (*model.graph.inputs, *(output for node in model.graph for output in node.outputs))
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(side, symbol) for side in value.shape])


def _renamed(side: int | ir.SymbolicDim, symbol: re.Pattern[str]) -> int | ir.SymbolicDim:
    named = isinstance(side, ir.SymbolicDim) and side.value is not None
    return ir.SymbolicDim(symbol.sub("batch", str(side.value))) if named else side  # type: ignore[union-attr]


def name_by_module(model: ir.Model) -> None:
    """Name every node `module.path/Operator` and drop the exporter's traces of the build machine."""
    seen: Counter[str] = Counter()
    for node in model.graph:
        path = _module_of(node)
        stem = f"{path}/{node.op_type}" if path else node.op_type
        seen[stem] += 1
        node.name = stem if seen[stem] == 1 else f"{stem}_{seen[stem]}"
        for index, value in enumerate(node.outputs):
            value.metadata_props.clear()
            if not value.is_graph_output():
                value.name = f"{node.name}:{index}"
        node.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _module_of(node: ir.Node) -> str:
    scopes = node.metadata_props.get(_SCOPES)
    if scopes is not None:
        parts = ast.literal_eval(scopes)
        return str(parts[-2]) if len(parts) > 1 else ""
    users = [user.node for output in node.outputs for user in output.uses()]
    return _module_of(users[0]) if len(users) == 1 else ""


def remove_unused(model: ir.Model) -> None:
    """Drop nodes and initializers that nothing reads."""
    common.RemoveUnusedNodesPass()(model)


PASSES: tuple[Callable[[ir.Model], None], ...] = (
    split_quantized_gemm,
    fold_weight_transposes,
    merge_heads,
    transpose_images,
    remove_unused,
    name_batch,
    name_by_module,
)
