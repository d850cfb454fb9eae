"""Which rows of a tensor come from the same rows of another: operators that treat each token by itself.

Both ways to change how many tokens there are go by it: leaving out those that nobody reads (`tokens.py`)
and padding to a count that suits a runtime's products (`pad_tokens.py`).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.fx import Node

from vit_export.export.graph import aten
from vit_export.export.quantize import DEQUANTIZE, QUANTIZE

_SAME = (
    aten.gelu.default, aten.relu.default, aten.silu.default, aten.tanh.default, aten.sigmoid.default,
    aten.hardtanh.default, aten.clone.default, aten.contiguous.default, aten.alias.default,
    QUANTIZE, DEQUANTIZE,
)  # fmt: skip
_BROADCAST = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
_SOFTMAX = (aten.softmax.int, aten._softmax.default)
_ATTENTION = aten.scaled_dot_product_attention.default
PARTS = (
    operator.getitem, aten.select.int, aten.slice.Tensor, aten.unbind.int, aten.split.Tensor,
    aten.split_with_sizes.default, aten.chunk.default,
)  # fmt: skip


def row_sources(node: Node, dim: int) -> Iterator[tuple[Node, int]]:
    """(input, its dimension) for each input whose rows become the rows of `dim`; none if rows are mixed."""
    rank, first = len(shape_of(node)), argument(node, 0)
    if node.target in _BROADCAST and all(shape_of(source) for source in node.all_input_nodes):
        for source in node.all_input_nodes:
            own = dim - (rank - len(shape_of(source)))
            if own >= 0 and shape_of(source)[own] != 1:
                yield source, own
    elif node.target is aten.transpose.int:
        one, other = (int(a) % rank for a in node.args[1:3])  # type: ignore[arg-type]
        yield first, {one: other, other: one}.get(dim, dim)
    elif node.target is aten.permute.default:
        yield first, int(node.args[1][dim]) % rank  # type: ignore[index, arg-type]
    elif node.target is aten.reshape.default:
        if _keeps(node, dim):
            yield first, dim
    elif node.target is _ATTENTION:
        yield from _queries(node, dim)
    elif node.target in PARTS:
        yield from _of_part(node, dim)
    elif node.target in _SAME or _per_row(node, dim, rank):
        yield first, dim


def _per_row(node: Node, dim: int, rank: int) -> bool:
    """Operators that compute each row from the same row of their first input."""
    if node.target in _SOFTMAX:
        return dim != int(node.args[1]) % rank  # type: ignore[arg-type]
    if node.target is aten.layer_norm.default:
        return dim < rank - len(node.args[1])  # type: ignore[arg-type]
    if node.target is aten.matmul.default:
        return dim == rank - 2 and len(shape_of(node.args[0])) == rank
    return node.target is aten.linear.default and dim < rank - 1


def _queries(node: Node, dim: int) -> Iterator[tuple[Node, int]]:
    """Attention's result has a row a query; so has a mask, unless it is the same for all."""
    mask, causal = argument(node, 3, node.kwargs.get("attn_mask")), argument(node, 5)
    if dim != len(shape_of(node)) - 2 or causal or node.kwargs.get("is_causal"):
        return
    yield node.args[0], dim  # type: ignore[misc]
    if isinstance(mask, Node) and shape_of(mask)[-2] != 1:
        yield mask, len(shape_of(mask)) - 2


def _of_part(node: Node, dim: int) -> Iterator[tuple[Node, int]]:
    """A part of a tensor, or all parts of it, has the same rows unless it was cut along them."""
    source = argument(node, 0)
    if node.target is operator.getitem:
        yield source, dim
        return
    place = 1 if node.target in (aten.select.int, aten.unbind.int, aten.slice.Tensor) else 2
    cut = int(argument(node, place, 0)) % max(1, len(shape_of(source)))
    if node.target in (aten.select.int, aten.unbind.int):
        yield source, dim + (dim >= cut)
    elif dim != cut:
        yield source, dim


def _keeps(node: Node, dim: int) -> bool:
    """Whether a reshape leaves `dim` and all before it as they are (the batch may be a symbol)."""
    before, after = shape_of(node.args[0]), shape_of(node)
    same = len(before) > dim and list(before[1 : dim + 1]) == list(after[1 : dim + 1])
    return same and str(before[0]) == str(after[0])


def shape_of(node: object) -> tuple[Any, ...]:
    """Sides of the tensor a node gives, the batch maybe a symbol; of the first one where it gives several."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    value = value[0] if isinstance(value, list | tuple) and value else value
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def argument(node: Node, index: int, default: Any = None) -> Any:
    """An argument by its place, or what it is when it was not given."""
    return node.args[index] if len(node.args) > index else default
