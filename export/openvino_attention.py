"""Forms of attention that OpenVINO gets right: as many queries as heads, a bias of one row for all queries.

OpenVINO's CPU plugin (2026.4.1) fuses an attention into one kernel that may write its result over the queries
when both have one shape. The kernel takes in the transposes of the queries and of the result as well, in
bfloat16 only the first. With as many queries as heads [B, H, N, D] and [B, N, H, D] are one shape: the kernel
then reads one order, writes another, and overwrites queries that it still needs (5 to 9 dB instead of 50).
Measured: wrong where exactly one of the two transposes is fused, H = N and the batch is static, in float32 as
in bfloat16. PVTv2's last stage at 64 pixels is such an attention (4 tokens, 4 heads), Swin with 16 heads and
windows of 4x4 another.

In bfloat16 the same kernel adds a bias [.., 1, N] wrongly at any size (-3 dB), and [.., M, N] rightly.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from vit_export.export.onnx_edit import add_initializer, shape_initializer

_PERM = [0, 2, 1, 3]


def keep_transposes_apart(model: ir.Model) -> int:
    """Write the transposes around such attentions so that none is fused, in place; how many there were.

    Exact: the values of a head are transposed as two halves, which the fusion does not look for.
    """
    found = [node for result in _results(model.graph) for node in (result, _of_queries(result)) if node]
    for node in found:
        _halve(model, node)
    return len(found)


def spread_bias(model: ir.Model) -> int:
    """Give constant biases of one row a row for each query, in place; how many there were. Exact."""
    found = 0
    for node in model.graph:
        add = _past(node.inputs[0]) if node.op_type == "Softmax" else None
        if add is None or add.op_type != "Add":
            continue
        rows = add.outputs[0].shape[-2] if add.outputs[0].shape is not None else None
        for index, value in enumerate(add.inputs):
            bias = value.const_value.numpy() if value is not None and value.const_value is not None else None
            if bias is None or bias.ndim < 2 or bias.shape[-2] != 1 or not isinstance(rows, int) or rows == 1:
                continue
            name = f"{add.name}.bias.{rows}"
            spread = add_initializer(model, name, np.repeat(bias, rows, axis=-2))
            add.replace_input_with(index, spread)
            found += 1
    return found


def _results(graph: ir.Graph) -> Iterator[ir.Node]:
    """The transposes of softmax · values with as many queries as heads."""
    for node in graph:
        if _turns(node) and _alike(node.inputs[0]) and _softmax(node) is not None:
            yield node


def _of_queries(result: ir.Node) -> ir.Node | None:
    """The transpose of the queries behind a result, past a bias or mask and the scale."""
    softmax = _softmax(result)
    assert softmax is not None
    node = _past(softmax.inputs[0], "Add")
    scores = _past(node.outputs[0], "Mul", "Div") if node is not None else None
    queries = _past(scores.inputs[0], "Mul", "Div") if scores is not None else None
    return queries if queries is not None and _turns(queries) else None


def _past(value: ir.Value | None, *kinds: str) -> ir.Node | None:
    """The node that makes a value, or its first input where the node is of one of the kinds."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type not in kinds or node.inputs[0] is None:
        return node
    return node.inputs[0].producer()


def _softmax(transpose: ir.Node) -> ir.Node | None:
    """The softmax whose product with values is transposed."""
    product = _past(transpose.inputs[0])
    if product is None or product.op_type != "MatMul":
        return None
    weights = _past(product.inputs[0])
    return weights if weights is not None and weights.op_type == "Softmax" else None


def _turns(node: ir.Node) -> bool:
    """Whether a node transposes [B, H, N, D] to [B, N, H, D] or back."""
    return node.op_type == "Transpose" and list(node.attributes.get_ints("perm", ())) == _PERM


def _alike(value: ir.Value | None) -> bool:
    """Whether [B, N, N, D] has values that can be halved."""
    shape = value.shape if value is not None else None
    if shape is None or not all(isinstance(side, int) for side in shape[1:]):
        return False
    return shape[1] == shape[2] != 1 and int(shape[3]) % 2 == 0


def _halve(model: ir.Model, node: ir.Node) -> None:
    """Transpose → Reshape to halves of a head's values, Transpose of five dimensions, Reshape."""
    given, out = node.inputs[0], node.outputs[0]
    assert given is not None and given.shape is not None
    heads, queries, width = (int(side) for side in given.shape[1:])
    halves = ir.node("Reshape", [given, shape_initializer(model, (0, heads, queries, 2, width // 2))])
    turned = ir.node("Transpose", halves.outputs, attributes={"perm": [*_PERM, 4]})
    whole = ir.node("Reshape", [turned.outputs[0], shape_initializer(model, (0, queries, heads, width))])
    for new, part in ((halves, "halves"), (turned, "turned"), (whole, "whole")):
        new.name = f"{node.name}/{part}"
        new.metadata_props.update(node.metadata_props)
    model.graph.insert_before(node, (halves, turned, whole))
    whole.outputs[0].shape, whole.outputs[0].type = out.shape, out.type
    out.replace_all_uses_with(whole.outputs[0], replace_graph_outputs=True)
    model.graph.remove(node, safe=True)
