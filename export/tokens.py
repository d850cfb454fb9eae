"""Dropping the tokens that nobody reads: a ViT that answers with its class token computes all others in vain.

After the last attention each token goes its own way. Where only the class token is read at the end, the last
block's projection, MLP and norms, the final norm and all queries but one are work for nothing: 6 % of
DINOv2-S's products at 224 pixels, more of its time. What is read is followed from the end of the graph to
the front; a dimension is narrowed at the first operator that mixes it (attention's keys and values do).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Node

from vit_export.export.graph import Edit, aten

_SAME = (
    aten.gelu.default, aten.relu.default, aten.silu.default, aten.tanh.default, aten.sigmoid.default,
    aten.hardtanh.default, aten.clone.default, aten.contiguous.default, aten.alias.default,
)  # fmt: skip
_BROADCAST = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
_SOFTMAX = (aten.softmax.int, aten._softmax.default)
_ATTENTION = aten.scaled_dot_product_attention.default


@dataclass(frozen=True, slots=True)
class Part:
    """Rows start..stop of a dimension, 0 being the batch (which is never narrowed)."""

    dim: int
    start: int
    stop: int

    @property
    def count(self) -> int:
        """How many rows."""
        return self.stop - self.start

    def joined(self, other: Part) -> Part | None:
        """The shortest part that has both; None for another dimension."""
        if other.dim != self.dim:
            return None
        return Part(self.dim, min(self.start, other.start), max(self.stop, other.stop))

    def within(self, outer: Part) -> Part:
        """The same rows counted from the start of a part that has them."""
        return Part(self.dim, self.start - outer.start, self.stop - outer.start)


def drop_unread_tokens(edit: Edit) -> None:
    """Compute of each tensor only the rows that are read, as far as one dimension of it goes."""
    read = _what_is_read(edit)
    wishes = {n: list(_asks(n, read.get(n))) for n in edit.graph.nodes if n in read or n.target in _TAKES}
    for node, asked in wishes.items():
        for source, part in asked:
            _give(edit, node, source, part, read.get(source))
        if node in read and node.op != "get_attr":
            _narrow(node, read[node])


def _what_is_read(edit: Edit) -> dict[Node, Part]:
    """Of each tensor that can be narrowed by narrowing what it is made of: the rows that any user reads."""
    read: dict[Node, Part] = {}
    asked: dict[Node, list[Part | None]] = {}
    for node in reversed(list(edit.graph.nodes)):
        wishes = asked.pop(node, [])
        part = wishes[0] if wishes else None
        for wish in wishes[1:]:
            part = part.joined(wish) if part is not None and wish is not None else None
        if part is not None and _passes(node, part):
            read[node] = part
        given = dict(_asks(node, read.get(node)))
        for source in node.all_input_nodes:
            asked.setdefault(source, []).append(given.get(source))
    return read


def _passes(node: Node, part: Part) -> bool:
    """Whether `node` is computed row by row along the part's dimension, and most rows are not read.

    Leaving out the class token of a model that reads all others would spare nothing.
    """
    shape = _shape(node)
    if part.dim == 0 or not shape or not isinstance(shape[part.dim], int) or part.count * 2 > shape[part.dim]:
        return False
    return node.target not in _TAKES and any(True for _ in _asks(node, part))


def _asks(node: Node, part: Part | None) -> Iterator[tuple[Node, Part]]:
    """What a node reads of its inputs when only `part` of it is read; nothing is said of whole inputs."""
    taken = _taken(node)
    if taken is not None:
        yield node.args[0], taken  # type: ignore[misc]
    elif part is not None and node.op == "call_function":
        for source, dim in _rows(node, part.dim):
            yield source, Part(dim, part.start, part.stop)


_TAKES = (aten.select.int, aten.slice.Tensor)


def _taken(node: Node) -> Part | None:
    """What a select, or a slice with a step of one, takes; None for other nodes."""
    if node.target not in _TAKES:
        return None
    source, dim, first = _argument(node, 0), int(_argument(node, 1, 0)), _argument(node, 2, 0)
    shape = _shape(source)
    dim %= max(1, len(shape))
    size = shape[dim] if shape else None
    if dim == 0 or not isinstance(size, int) or not isinstance(first, int | None):
        return None
    if node.target is aten.select.int:
        assert first is not None
        return Part(dim, first % size, first % size + 1)
    last = _argument(node, 3)
    if not isinstance(last, int | None) or _argument(node, 4, 1) != 1:
        return None
    start, stop, _ = slice(first, last).indices(size)
    return Part(dim, start, stop) if stop > start else None


def _rows(node: Node, dim: int) -> Iterator[tuple[Node, int]]:
    """(input, its dimension) for each input whose rows become the rows of `dim`; none if rows are mixed."""
    rank, first = len(_shape(node)), _argument(node, 0)
    if node.target in _BROADCAST and all(_shape(source) for source in node.all_input_nodes):
        for source in node.all_input_nodes:
            own = dim - (rank - len(_shape(source)))
            if own >= 0 and _shape(source)[own] != 1:
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
    elif node.target in _SAME or _per_row(node, dim, rank):
        yield first, dim


def _per_row(node: Node, dim: int, rank: int) -> bool:
    """Operators that compute each row from the same row of their first input."""
    if node.target in _SOFTMAX:
        return dim != int(node.args[1]) % rank  # type: ignore[arg-type]
    if node.target is aten.layer_norm.default:
        return dim < rank - len(node.args[1])  # type: ignore[arg-type]
    if node.target is aten.matmul.default:
        return dim == rank - 2 and len(_shape(node.args[0])) == rank
    return node.target is aten.linear.default and dim < rank - 1


def _queries(node: Node, dim: int) -> Iterator[tuple[Node, int]]:
    """Attention's result has a row a query; so has a mask, unless it is the same for all."""
    mask, causal = _argument(node, 3, node.kwargs.get("attn_mask")), _argument(node, 5)
    if dim != len(_shape(node)) - 2 or causal or node.kwargs.get("is_causal"):
        return
    yield node.args[0], dim  # type: ignore[misc]
    if isinstance(mask, Node) and _shape(mask)[-2] != 1:
        yield mask, len(_shape(mask)) - 2


def _keeps(node: Node, dim: int) -> bool:
    """Whether a reshape leaves `dim` and all before it as they are (the batch may be a symbol)."""
    before, after = _shape(node.args[0]), _shape(node)
    same = len(before) > dim and list(before[1 : dim + 1]) == list(after[1 : dim + 1])
    return same and str(before[0]) == str(after[0])


def _give(edit: Edit, node: Node, source: Node, part: Part, have: Part | None) -> None:
    """Let `node` read `part` of a source, of which `have` (or all) is there."""
    within = part if have is None else part.within(have)
    if node.target in _TAKES:
        _take(node, within)
    elif part != have:
        cut = edit.call(node, aten.slice.Tensor, source, within.dim, within.start, within.stop)
        cut.meta["val"] = source.meta["val"].narrow(within.dim, within.start, within.count)
        node.replace_input_with(source, cut)


def _take(node: Node, part: Part) -> None:
    """Let a select or slice take these rows."""
    last = (part.start,) if node.target is aten.select.int else (part.start, part.stop)
    node.args = (node.args[0], part.dim, *last)


def _narrow(node: Node, part: Part) -> None:
    """Note the shape of a node whose inputs have become shorter."""
    node.meta["val"] = node.meta["val"].narrow(part.dim, part.start, part.count)
    if node.target is aten.reshape.default:
        shape: list[Any] = list(node.args[1])  # type: ignore[arg-type]
        shape[part.dim] = part.count
        node.args = (node.args[0], shape)


def _shape(node: object) -> tuple[Any, ...]:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _argument(node: Node, index: int, default: Any = None) -> Any:
    return node.args[index] if len(node.args) > index else default
