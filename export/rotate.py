"""Turning the channels that linears read, so that no channel stands out: exact in float, free at run time.

Per-tensor activation codes are spent on the loudest channel. An orthogonal matrix spreads it over all others,
and the network stays the same if whoever wrote the channels turns them and whoever reads them turns back
(SliceGPT, Ashkboos et al. 2024, "computational invariance"; QuaRot, Ashkboos et al. 2024). Two places of a
ViT can be turned without an operator more:

- the residual stream. LayerNorm takes the mean of a token's channels away, so unlike with RMSNorm not every
  rotation will do: one that leaves the vector of ones alone commutes with it. Its weight and bias move into
  the linears behind it. What they then read has the same length for every token, so a new image cannot
  exceed the calibrated range by much.
- the values of each attention head, between the rows that make them and the columns that read them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node

from vit_export.artifacts import Layer, Program
from vit_export.export.bias import change_bias, change_constant
from vit_export.export.channels import ChannelGroup, find_groups
from vit_export.export.graph import Edit, aten, like_its_input
from vit_export.export.layers import Shapes
from vit_export.export.program import example
from vit_export.export.streams import Stream, find_streams

_MOST = 0.01  # of a model's products may be spent on turning a stream back where it is read otherwise


@dataclass(frozen=True, slots=True)
class Rotated:
    """program: the same function. streams, heads: how many of each were turned.

    norms: nodes of the LayerNorms over turned streams; nothing is left to equalise behind them.
    """

    program: Program
    streams: int = 0
    heads: int = 0
    norms: frozenset[str] = frozenset()


@torch.no_grad()
def rotate(program: Program, seed: int = 0) -> Rotated:
    """Turn every residual stream and attention head that can be; layer names stay.

    Matrices are random, from the seed. Float rounding is the only difference.
    """
    groups = {group.source: group for group in find_groups(program)}
    edit = Edit.of(program.graph)
    turning = _Turning(
        edit,
        {node.name: node for node in edit.graph.nodes},
        {layer.name: layer for layer in program.layers},
        torch.Generator().manual_seed(seed),
    )
    shapes = Shapes(program.graph)(
        example(program.image_size, 1 if program.dynamic_batch else program.batch_size)
    )[1]
    norms: list[str] = []
    streams = 0
    for stream in find_streams(program):
        if _can_turn(program, stream, groups, shapes):
            turning.stream(stream, groups)
            norms += [norm.name for norm in stream.norms if norm.name in groups]
            streams += 1
    heads = sum(turning.heads(group) for group in groups.values())
    if not streams and not heads:
        return Rotated(program)
    layers = tuple(turning.layers[layer.name] for layer in program.layers)
    return Rotated(replace(program, graph=edit.build(), layers=layers), streams, heads, frozenset(norms))


def _can_turn(
    program: Program,
    stream: Stream,
    groups: Mapping[str, ChannelGroup],
    shapes: Mapping[str, tuple[int, ...]],
) -> bool:
    """Whether all writers follow, some layers gain, and turning back for other readers costs little."""
    followers = [norm for norm in stream.norms if _absorbs(groups.get(norm.name))]
    sources = {source.name for _, source in _turned_back(stream, groups)}
    images = 1 if program.dynamic_batch else program.batch_size
    products = sum(torch.Size(shapes[name]).numel() * stream.size for name in sources) / images
    return stream.sound and bool(followers) and products <= _MOST * program.macs


def _absorbs(group: ChannelGroup | None) -> bool:
    """Whether every reader of a norm reads all of its channels."""
    return group is not None and all(len(set(c.channels.tolist())) == group.size for c in group.consumers)


def _turned_back(stream: Stream, groups: Mapping[str, ChannelGroup]) -> list[tuple[Node, Node]]:
    """(reader, tensor) where the stream must be as it was."""
    norms = [(norm, norm.args[0]) for norm in stream.norms if not _absorbs(groups.get(norm.name))]
    return [*stream.others, *norms]  # type: ignore[list-item]


@dataclass(slots=True)
class _Turning:
    """An edit of a program, with its layers as they become."""

    edit: Edit
    nodes: Mapping[str, Node]
    layers: dict[str, Layer]
    generator: torch.Generator

    def stream(self, stream: Stream, groups: Mapping[str, ChannelGroup]) -> None:
        """Writers turn, layers behind norms turn back, and so does an own product for each other reader."""
        turn = keeping_ones(stream.size, self.generator)
        for writer in stream.writers:
            self._write(self.nodes[writer.name], turn)
        for norm in stream.norms:
            group = groups.get(norm.name)
            if group is not None and _absorbs(group):
                whole = torch.kron(torch.eye(group.size // stream.size, dtype=turn.dtype), turn)
                self._absorb(group, whole)
        for linear in stream.linears:
            change_constant(self.edit, self.nodes[linear.name], 1, lambda w: _columns(w, turn))
        back: dict[str, Node] = {}
        for reader, source in _turned_back(stream, groups):
            held, at = self.nodes[source.name], self.nodes[reader.name]
            if source.name not in back:
                before = held.next
                name = f"{source.name}.turned_back"
                weight = self.edit.constant(name, turn.T.float().contiguous(), before)
                turned = self.edit.call(before, aten.linear.default, held, weight)
                back[source.name] = like_its_input(turned)
            at.replace_input_with(held, back[source.name])

    def heads(self, group: ChannelGroup) -> int:
        """Turn the channels that a group's attention keeps together; how many such heads there are."""
        source = self.nodes[group.source]
        if not group.heads or source.target is not aten.linear.default:
            return 0
        whole = torch.eye(group.size, dtype=torch.float64)
        for head in group.heads:
            whole[head[:, None], head] = orthogonal(len(head), self.generator)
        self._write(source, whole)
        for consumer in group.consumers:
            turn = whole[consumer.channels[:, None], consumer.channels]
            change_constant(self.edit, self.nodes[consumer.layer.node], 1, lambda w, t=turn: _columns(w, t))
        return len(group.heads)

    def _write(self, node: Node, turn: Tensor) -> None:
        """Give a writer's channels the turn."""
        if node.op == "get_attr":
            self.edit.replace_tensor(node, (self.edit.tensors[str(node.target)].double() @ turn.T).float())
            return
        layer = next(one for one in self.layers.values() if one.node == node.name)
        change_constant(self.edit, node, 1, lambda w: (turn @ w.double().flatten(1)).reshape(w.shape).float())
        if layer.bias is not None:
            change_constant(self.edit, node, 2, lambda b: (turn @ b.double()).float())

    def _absorb(self, group: ChannelGroup, turn: Tensor) -> None:
        """A norm's weight and bias go into the layers behind it, which then undo the turn."""
        norm = self.nodes[group.source]
        weight, bias = (self.edit.tensors[str(norm.args[i].target)].double() for i in (2, 3))  # type: ignore[union-attr]
        for consumer in group.consumers:
            node, at = self.nodes[consumer.layer.node], consumer.channels
            held = self.edit.tensors[str(node.args[1].target)].double()  # type: ignore[union-attr]
            added = held.flatten(2).sum(2) @ bias[at] if held.ndim > 2 else held @ bias[at]
            name = consumer.layer.name
            self.layers[name] = change_bias(
                self.edit, node, self.layers[name], lambda b, a=added: (b.double() + a).float()
            )
            undo = turn[at[:, None], at] * weight[at]
            change_constant(self.edit, node, 1, lambda w, t=undo: _columns(w, t))
        change_constant(self.edit, norm, 2, torch.ones_like)
        change_constant(self.edit, norm, 3, torch.zeros_like)


def _columns(weight: Tensor, turn: Tensor) -> Tensor:
    """W Tᵀ over the input channels of a linear [out, in] or convolution [out, in, kh, kw]."""
    return torch.einsum("oi...,ji->oj...", weight.double(), turn).float()


def orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix, float64 [size, size]."""
    factor, upper = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    matrix: Tensor = factor * upper.diagonal().sign()
    return matrix


def keeping_ones(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix that maps the vector of ones to itself, float64 [size, size]."""
    basis = torch.randn(size, size, generator=generator, dtype=torch.float64)
    basis[:, 0] = 1
    basis = torch.linalg.qr(basis)[0]
    inner = torch.eye(size, dtype=torch.float64)
    inner[1:, 1:] = orthogonal(size - 1, generator)
    matrix: Tensor = basis @ inner @ basis.T
    return matrix
