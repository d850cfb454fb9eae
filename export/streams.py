"""Residual streams of a traced graph: who writes into one, who reads it, and whether all of them can turn.

A residual stream is a tensor of tokens that blocks read through a LayerNorm and add to. An orthogonal matrix
moves exactly from all that is written into it to all that is read out of it, as long as nothing between looks
at single channels. As in channels.py, channel numbers are sent through the graph beside the values: what
is added or concatenated is one stream, whatever else it meets is a reader.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from vit_export.artifacts import Layer, Program
from vit_export.export.channels import MOVES, along, averaged, owns_weights
from vit_export.export.graph import aten
from vit_export.export.program import example

_CONVOLUTIONS = (aten.conv2d.default, aten.conv2d.padding)


@dataclass(slots=True, eq=False)
class Stream:
    """One residual stream of `size` channels, in the last dimension wherever it is read.

    writers: linears and convolutions whose outputs, and constants whose last dimensions, are its channels.
    norms: LayerNorms over it; such a norm may see several tokens side by side (patch merging).
    linears: that read it as it is, with weights of their own.
    others: (reader, tensor) for all else that reads it: it must be turned back there.
    sound: False where a writer cannot be changed, or a reader does not see whole channels in order.
    """

    size: int
    writers: list[Node] = field(default_factory=list)
    norms: list[Node] = field(default_factory=list)
    linears: list[Node] = field(default_factory=list)
    others: list[tuple[Node, Node]] = field(default_factory=list)
    sound: bool = True

    def take(self, other: Stream) -> None:
        """Two streams that meet are one."""
        self.writers += other.writers
        self.norms += other.norms
        self.linears += other.linears
        self.others += other.others
        self.sound &= other.sound and other.size == self.size


def find_streams(program: Program) -> tuple[Stream, ...]:
    """Every stream that some LayerNorm reads, in the order of their first writers. One forward of noise."""
    tracer = _Tracer(program)
    with torch.inference_mode():
        tracer.run(example(program.image_size, 1 if program.dynamic_batch else program.batch_size))
    return tuple(stream for stream in tracer.streams() if stream.norms)


@dataclass(frozen=True, slots=True, eq=False)
class _Carried:
    """The channel numbers of a tensor (or of a tuple of tensors), and whose they are."""

    stream: Stream
    ids: Any


class _Tracer(Interpreter):
    """Runs the graph; beside each tensor, the stream it belongs to."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.graph)
        self._layers: Mapping[str, Layer] = {layer.node: layer for layer in program.layers}
        self._into: dict[Stream, Stream] = {}  # a stream that has been taken → the one that has it
        self._begun: list[Stream] = []
        self._carried: dict[Node, _Carried] = {}

    def streams(self) -> Iterator[Stream]:
        """Once the graph has run; each once."""
        yield from dict.fromkeys(self._whole(stream) for stream in self._begun)

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        read = {i: self._carried[i] for i in n.all_input_nodes if i in self._carried}
        carried = self._passed_on(n, read) if read else None
        if read and carried is None:
            for source, held in read.items():
                self._reads(n, source, held)
        if carried is None:
            carried = self._written_by(n, value)
        if carried is not None:
            self._carried[n] = carried
        for used in n.all_input_nodes:
            if used in self.user_to_last_uses.get(n, ()):
                self._carried.pop(used, None)
        return value

    def _passed_on(self, n: Node, read: Mapping[Node, _Carried]) -> _Carried | None:
        """What `n` carries when it only moves, adds or joins tensors of streams; None for anything else."""
        if n.target in MOVES and n.args[0] in read and callable(n.target):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            held = read[n.args[0]]  # type: ignore[index]
            return _Carried(held.stream, n.target(held.ids, *args[1:], **kwargs))
        if n.target is aten.mean.dim and n.args[0] in read:
            held = read[n.args[0]]  # type: ignore[index]
            ids = averaged(n, held.ids)
            return None if ids is None else _Carried(held.stream, ids)
        if n.target is aten.cat.default and all(part in read for part in n.args[0]):  # type: ignore[union-attr]
            parts = [read[part] for part in n.args[0]]  # type: ignore[union-attr, index]
            dim = n.args[1] if len(n.args) > 1 else 0
            return _Carried(self._joined(parts), torch.cat([p.ids for p in parts], dim))  # type: ignore[arg-type]
        if n.target is aten.add.Tensor and len(n.args) == 2 and all(arg in read for arg in n.args):
            one, other = (read[arg] for arg in n.args)  # type: ignore[index]
            ids = torch.broadcast_tensors(one.ids, other.ids)  # type: ignore[no-untyped-call]
            return _Carried(self._joined([one, other]), ids[0]) if torch.equal(*ids) else None
        return None

    def _reads(self, n: Node, source: Node, held: _Carried) -> None:
        """`n` looks at a stream: as a LayerNorm over whole tokens, or in some other way."""
        stream = self._whole(held.stream)
        channels = along(held.ids, -1) if isinstance(held.ids, Tensor) else None
        whole = torch.arange(stream.size)
        if channels is None or len(channels) % stream.size:
            stream.sound = False
        elif n.target is aten.layer_norm.default and n.args[0] is source and n.args[1] == [len(channels)]:
            stream.norms.append(n)
            stream.sound &= torch.equal(channels, whole.repeat(len(channels) // stream.size))
        else:
            plain = n.name in self._layers and n.target is aten.linear.default and owns_weights(n)
            stream.linears.append(n) if plain else stream.others.append((n, source))
            stream.sound &= torch.equal(channels, whole)

    def _written_by(self, n: Node, value: Any) -> _Carried | None:
        """A new stream of what a linear, a convolution, a norm or a constant makes."""
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim < 2:
            return None
        layer = self._layers.get(n.name)
        if n.target in _CONVOLUTIONS:
            size = value.shape[1]
            ids = torch.arange(size).reshape(-1, *[1] * (value.ndim - 2)).expand(value.shape)
        elif layer is not None or n.op == "get_attr" or n.target is aten.layer_norm.default:
            size = value.shape[-1]
            ids = torch.arange(size).expand(value.shape)
        else:
            return None
        turns = n.op == "get_attr" or (layer is not None and owns_weights(n))
        self._begun.append(Stream(size, [n], sound=turns))
        return _Carried(self._begun[-1], ids)

    def _joined(self, parts: list[_Carried]) -> Stream:
        first, *others = dict.fromkeys(self._whole(part.stream) for part in parts)
        for other in others:
            first.take(other)
            self._into[other] = first
        return first

    def _whole(self, stream: Stream) -> Stream:
        while stream in self._into:
            stream = self._into[stream]
        return stream
