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

from torch.fx import Node

from vit_export.export.graph import Edit, aten
from vit_export.export.token_rows import PARTS, argument, row_sources, shape_of


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
    shape = shape_of(node)
    if part.dim == 0 or not shape or not isinstance(shape[part.dim], int) or part.count * 2 > shape[part.dim]:
        return False
    return node.target not in PARTS and any(True for _ in _asks(node, part))


def _asks(node: Node, part: Part | None) -> Iterator[tuple[Node, Part]]:
    """What a node reads of its inputs when only `part` of it is read; nothing is said of whole inputs."""
    taken = _taken(node)
    if taken is not None:
        yield node.args[0], taken  # type: ignore[misc]
    elif part is not None and node.op == "call_function":
        for source, dim in row_sources(node, part.dim):
            yield source, Part(dim, part.start, part.stop)


_TAKES = (aten.select.int, aten.slice.Tensor)


def _taken(node: Node) -> Part | None:
    """What a select, or a slice with a step of one, takes; None for other nodes."""
    if node.target not in _TAKES:
        return None
    source, dim, first = argument(node, 0), int(argument(node, 1, 0)), argument(node, 2, 0)
    shape = shape_of(source)
    dim %= max(1, len(shape))
    size = shape[dim] if shape else None
    if dim == 0 or not isinstance(size, int) or not isinstance(first, int | None):
        return None
    if node.target is aten.select.int:
        assert first is not None
        return Part(dim, first % size, first % size + 1)
    last = argument(node, 3)
    if not isinstance(last, int | None) or argument(node, 4, 1) != 1:
        return None
    start, stop, _ = slice(first, last).indices(size)
    return Part(dim, start, stop) if stop > start else None


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
