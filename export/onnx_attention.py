"""Tidying attention that the exporter wrote out: what remains is Mul, Transpose, MatMul, Softmax, MatMul.

torch's decomposition of scaled_dot_product_attention transposes the keys through two Reshapes whose
shapes it computes at run time, and scales queries and keys each by the square root of the scale. Both
get in the way of runtimes that look for attention to fuse (and TensorRT 10.7 fuses the second form
wrongly: NVIDIA/TensorRT#4333).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common


def tidy_attention(model: ir.Model) -> int:
    """Transpose keys directly and scale queries alone, in place; how many attentions were changed.

    The first is exact; the second rounds once instead of twice.
    """
    changed = 0
    for scores in list(_score_products(model.graph)):
        transposed = _transpose_keys(model.graph, scores)
        scaled = _scale_queries(model, scores)
        changed += transposed or scaled
    if changed:
        common.RemoveUnusedNodesPass()(model)
    return changed


def _score_products(graph: ir.Graph) -> Iterator[ir.Node]:
    """The MatMul before each softmax, through the addition of a bias or mask."""
    for softmax in graph:
        if softmax.op_type == "Softmax" and softmax.inputs[0] is not None:
            node = softmax.inputs[0].producer()
            sources = [node] if node is None or node.op_type != "Add" else [_producer(v) for v in node.inputs]
            yield from (s for s in sources if s is not None and s.op_type == "MatMul")


def _transpose_keys(graph: ir.Graph, scores: ir.Node) -> bool:
    """Reshape [B, H, N, D] → Transpose → Reshape [B, H, D, N] becomes one Transpose."""
    scale = _producer(scores.inputs[1])
    last = _producer(scale.inputs[0]) if scale is not None and scale.op_type == "Mul" else scale
    turn = _producer(last.inputs[0]) if last is not None and last.op_type == "Reshape" else None
    first = _producer(turn.inputs[0]) if turn is not None and turn.op_type == "Transpose" else None
    if last is None or turn is None or first is None or first.op_type != "Reshape":
        return False
    keys = first.inputs[0]
    if keys is None or keys.shape is None or len(keys.shape) != 4 or not _swaps(first, turn, last, keys):
        return False
    direct = ir.node("Transpose", [keys], attributes={"perm": [0, 1, 3, 2]}, name=turn.name)
    out = direct.outputs[0]
    out.name, out.type = turn.outputs[0].name, keys.type
    out.shape = ir.Shape([keys.shape[i] for i in (0, 1, 3, 2)])
    turn.outputs[0].name = f"{out.name}.unused"
    direct.metadata_props.update(turn.metadata_props)
    graph.insert_before(last, direct)
    last.outputs[0].replace_all_uses_with(out)
    return True


def _swaps(first: ir.Node, turn: ir.Node, last: ir.Node, keys: ir.Value) -> bool:
    """Whether the three nodes together swap the last two dimensions of `keys` and nothing else."""
    assert keys.shape is not None
    if list(turn.attributes.get_ints("perm", ())) != [0, 2, 1]:
        return False
    _, heads, tokens, channels = keys.shape
    flat, full = _constant(first.inputs[1]), _constant(last.inputs[1])
    if flat is not None and full is not None:
        return list(flat[1:]) == [tokens, channels] and list(full[-3:]) == [heads, channels, tokens]
    return _only_shape_of(first.inputs[1], keys) and _only_shape_of(last.inputs[1], keys)


def _only_shape_of(value: ir.Value | None, source: ir.Value) -> bool:
    """Whether a shape is made of constants and the dimensions of `source` alone."""
    todo, seen = [value], False
    while todo:
        current = todo.pop()
        if current is None or _constant(current) is not None:
            continue
        node = current.producer()
        if node is None:
            return False
        if node.op_type == "Shape":
            if node.inputs[0] is not source:
                return False
            seen = True
        elif node.op_type in ("Slice", "Concat", "Gather", "Squeeze", "Unsqueeze", "Cast"):
            todo += node.inputs
        else:
            return False
    return seen


def _scale_queries(model: ir.Model, scores: ir.Node) -> bool:
    """(q r) (k r)ᵀ becomes (q r²) kᵀ where both are scaled by one constant."""
    queries, keys = (_producer(value) for value in scores.inputs)
    if queries is None or keys is None or queries.op_type != "Mul" or keys.op_type != "Mul":
        return False
    factors = [_constant(node.inputs[1]) for node in (queries, keys)]
    if any(factor is None or factor.size != 1 for factor in factors):
        return False
    product = np.prod([factor.item() for factor in factors if factor is not None])
    name = f"{queries.name}.scale"
    array = np.asarray(product, np.float32)
    if name not in model.graph.initializers:
        model.graph.register_initializer(ir.val(name, const_value=ir.tensor(array, name=name)))
    queries.replace_input_with(1, model.graph.initializers[name])
    scores.replace_input_with(1, keys.inputs[0])
    return True


def _producer(value: ir.Value | None) -> ir.Node | None:
    return value.producer() if value is not None else None


def _constant(value: ir.Value | None) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]] | None:
    return value.const_value.numpy() if value is not None and value.const_value is not None else None
