"""Padding the tokens to a count that OpenVINO's threads share evenly: 260 for 257, 203 for 197 (`blocks.py`).

257 tokens (16 x 16 and a class token) and 197 are prime numbers, and integer products over them take
a quarter longer than over a few more. The new rows are zeros at the end of what the tokens are made of. Each
row is computed from the same row alone until keys and values mix them; those, like the output, are cut back
to the real tokens. What is computed for them is unchanged.

(A bias that hides the new keys spares the cut, and OpenVINO 2026.4 adds one of [1, 1, 1, keys] wrongly in
bfloat16; of [1, 1, queries, keys] it was 0.7 % faster than cutting and as large as a weight.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import Tensor
from torch.fx import Node
from torch.nn.functional import pad

from vit_export.artifacts import Program
from vit_export.export.blocks import equal_rows
from vit_export.export.graph import Edit, aten
from vit_export.export.token_rows import row_sources, shape_of


def pad_tokens(program: Program, count: Callable[[int], int] = equal_rows) -> Program:
    """The same program over `count` of its tokens; the program itself where that is as many.

    Tokens are those of most linears over [batch, tokens, channels]. A mean over tokens reads the real ones.
    """
    edit = Edit.of(program.graph)
    rows = _rows(edit)
    padded = count(rows) if rows else rows
    if padded == rows:
        return program
    _Padding(edit, rows, padded).apply()
    return replace(program, graph=edit.build())


def _rows(edit: Edit) -> int:
    """Tokens of most linears [batch, tokens, channels]; 0 where the first dimension is not the batch."""
    image = next(iter(edit.graph.find_nodes(op="placeholder")))
    counts: Counter[int] = Counter()
    for linear in edit.nodes(aten.linear.default):
        shape = shape_of(linear)
        if len(shape) == 3 and str(shape[0]) == str(shape_of(image)[0]) and isinstance(shape[1], int):
            counts[shape[1]] += 1
    return counts.most_common(1)[0][0] if counts else 0


@dataclass(slots=True)
class _Padding:
    """longer: tensors that get more rows, with the dimension: all that linears over the tokens are made of.
    made: where rows can be followed no further; they are padded behind."""

    edit: Edit
    rows: int
    padded: int
    longer: dict[Node, int] = field(default_factory=dict)
    made: dict[Node, int] = field(default_factory=dict)

    def apply(self) -> None:
        """Find the tensors, then change graph and shapes."""
        for linear in self.edit.nodes(aten.linear.default):
            shape = shape_of(linear)
            if len(shape) == 3 and shape[1] == self.rows:
                self._follow(linear, 1)
        for node in list(self.edit.graph.nodes):
            if node in self.made:
                self._pad(node, self.made[node])
            elif node in self.longer:
                self._cut(node, self.longer[node])
        for node, dim in self.longer.items():
            _lengthen(node, dim, self.padded)

    def _follow(self, node: Node, dim: int) -> None:
        todo = [(node, dim)]
        while todo:
            current, dim = todo.pop()
            if current in self.longer or current in self.made:
                continue
            sources = list(row_sources(current, dim))
            if not sources:
                self.made[current] = dim
                continue
            self.longer[current] = dim
            todo += sources
            if isinstance(current.meta["val"], list | tuple):
                todo += [(part, dim) for part in current.users]

    def _pad(self, node: Node, dim: int) -> None:
        """Give the readers that want more rows a longer tensor."""
        readers = [user for user in node.users if self._wants(user, node)]
        sides = [0, 0] * (len(shape_of(node)) - dim - 1) + [0, self.padded - self.rows]
        value = self.edit.tensor(node)
        if value is None:
            new = self.edit.call(node.next, aten.pad.default, node, sides)
            new.meta["val"] = node.meta["val"]
        else:
            new = self.edit.constant(f"{node.target}_padded", pad(value, sides), readers[0])
        for user in readers:
            user.replace_input_with(node, new)

    def _cut(self, node: Node, dim: int) -> None:
        """Give readers that want the tokens alone a shorter tensor."""
        for user in [user for user in node.users if not self._wants(user, node)]:
            cut = self.edit.call(user, aten.slice.Tensor, node, dim, 0, self.rows)
            cut.meta["val"] = node.meta["val"]
            user.replace_input_with(node, cut)

    def _wants(self, user: Node, node: Node) -> bool:
        if user not in self.longer:
            return False
        return any(source is node for source, _ in row_sources(user, self.longer[user]))


def _lengthen(node: Node, dim: int, rows: int) -> None:
    """Note the shape of a node that has more rows."""
    value = node.meta["val"]
    several = isinstance(value, list | tuple)
    longer = [_longer(one, dim, rows) for one in (value if several else [value])]
    node.meta["val"] = longer if several else longer[0]
    if node.target is aten.reshape.default:
        shape = list(node.args[1])  # type: ignore[arg-type]
        shape[dim] = rows
        node.args = (node.args[0], shape)


def _longer(value: Tensor, dim: int, rows: int) -> Tensor:
    return value.new_empty([rows if i == dim else side for i, side in enumerate(value.shape)])
