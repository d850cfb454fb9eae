"""Which channels of which layer come from where: what may be rescaled or shifted without changing a network.

A factor moves exactly from the channels that a LayerNorm (or a linear) makes to the weights of the linears
that read them, as long as nothing in between mixes channels. Rather than match the many ways in which
models write that path (a joined qkv, heads split by view or by unbind, windows, class token alone), an
array of channel numbers is sent through the same operators next to the real values, and read where it
arrives. Attention passes on the channels of its values: it averages over tokens with weights that sum to 1,
so a factor and a constant pass as well. Of its keys it sees no constant at all: all scores of a query would
move by the same number, which softmax takes back.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from vit_export.artifacts import Layer, Program
from vit_export.export.graph import aten, module_path
from vit_export.export.program import example

# Operators that move or copy values and compute nothing. Their first argument is the tensor they move.
MOVES = (
    aten.reshape.default, aten.view.default, aten.flatten.using_ints, aten.permute.default,
    aten.transpose.int, aten.slice.Tensor, aten.select.int, aten.unbind.int, aten.chunk.default,
    aten.split.Tensor, aten.split_with_sizes.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.squeeze.dims, aten.expand.default, aten.roll.default, aten.clone.default, aten.unflatten.int,
    operator.getitem,
)  # fmt: skip
_SOFTMAX = (aten.softmax.int, aten._softmax.default)
_PRODUCTS = (aten.matmul.default, aten.bmm.default)


@dataclass(frozen=True, slots=True, eq=False)
class Consumer:
    """A layer that reads a group. channels: int64 [in], the source channel behind each of its inputs."""

    layer: Layer
    channels: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class ChannelGroup:
    """Layers that read channels of one source and everything else that could is not affected.

    source: its node (layer_norm, or a linear whose rows are the channels); name: module path of it.
    size: channels of the source, of which only those in `consumers` may be changed.
    heads: int64 [D] each, channels that attention passes on side by side; empty without attention.
    """

    source: str
    name: str
    size: int
    consumers: tuple[Consumer, ...]
    heads: tuple[Tensor, ...] = ()

    def used(self) -> Tensor:
        """Sorted int64 channels that some consumer reads."""
        read: Tensor = torch.unique(torch.cat([consumer.channels for consumer in self.consumers]))
        return read


def find_groups(program: Program) -> tuple[ChannelGroup, ...]:
    """Every LayerNorm and linear whose channels can be rescaled and shifted, in execution order.

    One forward of seeded noise. A weight that two layers share makes its readers ineligible.
    """
    return tuple(_traced(program).groups())


def find_keys(program: Program) -> Mapping[str, Tensor]:
    """Channels that nothing but attention reads, as keys: source node → sorted int64 channels of it.

    A constant may be added to each of them without changing the network. One forward of seeded noise.
    """
    return dict(_traced(program).keys())


def _traced(program: Program) -> _Tracer:
    tracer = _Tracer(program)
    with torch.inference_mode():
        tracer.run(example(program.image_size, 1 if program.dynamic_batch else program.batch_size))
    return tracer


def loose(program: Program, groups: Iterable[ChannelGroup]) -> tuple[ChannelGroup, ...]:
    """The inputs of linears that are in none of the groups; a group for each tensor that is read."""
    nodes = {node.name: node for node in program.graph.graph.nodes}
    grouped = {consumer.layer.name for group in groups for consumer in group.consumers}
    readers: dict[Node, list[Consumer]] = {}
    for layer in program.layers:
        node = nodes[layer.node]
        source = node.args[0]
        if (
            layer.kind == "linear"
            and layer.name not in grouped
            and owns_weights(node)
            and isinstance(source, Node)
        ):
            readers.setdefault(source, []).append(Consumer(layer, torch.arange(layer.shape[1])))
    return tuple(
        ChannelGroup(source.name, module_path(source), len(found[0].channels), tuple(found))
        for source, found in readers.items()
        if source.target is not aten.linear.default
    )


@dataclass(slots=True)
class _Source:
    node: Node
    size: int
    leaked: set[int] = field(default_factory=set)
    keys: set[int] = field(default_factory=set)
    consumers: list[Consumer] = field(default_factory=list)
    heads: dict[tuple[int, ...], None] = field(default_factory=dict)  # in order

    def leak(self, ids: Tensor) -> None:
        """These channels are read by something that a factor or a constant would change."""
        self.leaked.update(torch.unique(ids).tolist())

    def read(self) -> set[int]:
        """Channels that layers read."""
        return {int(channel) for consumer in self.consumers for channel in consumer.channels}


class _Tracer(Interpreter):
    """Runs the graph; beside each tensor, the channel numbers of the sources it was moved from."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.graph)
        nodes = {node.name: node for node in program.graph.graph.nodes}
        self._layers = {layer.node: layer for layer in program.layers if owns_weights(nodes[layer.node])}
        self._sources: dict[str, _Source] = {}
        self._ids: dict[Node, dict[str, Any]] = {}

    def groups(self) -> Iterator[ChannelGroup]:
        """What can be changed, once the graph has run."""
        for name, source in self._sources.items():
            if source.consumers and not source.read() & (source.leaked | source.keys):
                heads = tuple(torch.tensor(head) for head in source.heads)
                yield ChannelGroup(
                    name, module_path(source.node), source.size, tuple(source.consumers), heads
                )

    def keys(self) -> Iterator[tuple[str, Tensor]]:
        """Sources with channels that are keys and nothing else, once the graph has run."""
        for name, source in self._sources.items():
            if free := sorted(source.keys - source.leaked - source.read()):
                yield name, torch.tensor(free)

    def run_node(self, n: Node) -> Any:
        carried = {i: self._ids[i] for i in n.all_input_nodes if self._ids.get(i)}
        found: dict[str, Any] = {}
        value = None
        for node, numbers in carried.items():
            for name, ids in numbers.items():
                if (moved := self._moved(n, node, ids)) is not None:
                    found[name] = moved
                elif not self._consumed(n, node, self._sources[name], ids):
                    value = super().run_node(n) if value is None else value
                    if (mixed := _through_attention(n, node, ids, value)) is not None:
                        found[name] = mixed
                        rows = mixed[..., 0, :].reshape(-1, mixed.shape[-1])
                        self._sources[name].heads |= dict.fromkeys(map(tuple, rows.tolist()))
                    elif _as_keys(n, node, ids):
                        self._sources[name].keys.update(torch.unique(ids).tolist())
                    else:
                        self._sources[name].leak(ids)
        value = super().run_node(n) if value is None else value
        if (size := _source_size(n, self._layers)) is not None:
            found[n.name] = torch.arange(size).expand(value.shape)
            self._sources[n.name] = _Source(n, size)
        self._ids[n] = found
        for used in n.all_input_nodes:  # numbers are as large as the values: drop them as early
            if self.user_to_last_uses.get(n) and used in self.user_to_last_uses[n]:
                self._ids.pop(used, None)
        return value

    def _moved(self, n: Node, node: Node, ids: Any) -> Any:
        """The numbers after an operator that only moves values; None for any other operator."""
        if n.target is aten.mean.dim:
            return averaged(n, ids)
        if n.target not in MOVES or n.args[0] is not node or not callable(n.target):
            return None
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        return n.target(ids, *args[1:], **kwargs)

    def _consumed(self, n: Node, node: Node, source: _Source, ids: Tensor) -> bool:
        """Whether `n` is a layer that reads one channel at each of its inputs."""
        layer = self._layers.get(n.name)
        if layer is None or n.args[0] is not node or not _reads_plainly(n, layer):
            return False
        channels = along(ids, dim=-1 if layer.kind == "linear" else 1)
        if channels is None:
            return False
        source.consumers.append(Consumer(layer, channels))
        return True


def _source_size(n: Node, layers: dict[str, Layer]) -> int | None:
    """Channels of a LayerNorm with a weight and a bias of its own, or rows of a linear; None for others."""
    if n.target is aten.layer_norm.default:
        shape = n.args[1]
        one = isinstance(shape, list | tuple) and len(shape) == 1
        return int(shape[0]) if one and len(n.args) > 3 and owns_weights(n, 2, 3) else None  # type: ignore[index, arg-type]
    layer = layers.get(n.name)
    return layer.shape[0] if layer is not None and layer.kind == "linear" else None


def owns_weights(n: Node, *indices: int) -> bool:
    """Whether weight and bias are constants that nothing else reads (a missing bias is)."""
    read = [n.args[i] if len(n.args) > i else None for i in indices or (1, 2)]
    if read[0] is None:
        return False
    return all(r is None or (isinstance(r, Node) and r.op == "get_attr" and len(r.users) == 1) for r in read)


def _reads_plainly(n: Node, layer: Layer) -> bool:
    """A linear, or a convolution without groups and padding (padding is not shifted with the rest)."""
    if layer.kind == "linear":
        return True
    padding = n.args[4] if len(n.args) > 4 else 0
    groups = n.args[6] if len(n.args) > 6 else 1
    nothing = padding in (0, "valid") or (isinstance(padding, list | tuple) and not any(padding))
    return bool(nothing and groups == 1)


def along(ids: Tensor, dim: int) -> Tensor | None:
    """The numbers along `dim`, int64 [C], when they are the same everywhere else; None otherwise."""
    rows = ids.movedim(dim, -1)
    first = rows[(0,) * (rows.ndim - 1)]
    return first.clone() if bool((rows == first).all()) else None


def averaged(n: Node, ids: Tensor) -> Tensor | None:
    """The numbers after a mean over dimensions along which they do not change; None for another mean."""
    dims, keep = n.args[1], bool(n.args[2]) if len(n.args) > 2 else False
    least = ids.amin(dims, keepdim=keep)  # type: ignore[arg-type]
    return least if torch.equal(least, ids.amax(dims, keepdim=keep)) else None  # type: ignore[arg-type]


def _through_attention(n: Node, node: Node, ids: Tensor, value: Any) -> Tensor | None:
    """The numbers of attention's output [..., N, D] where `node` is its values; None for anything else."""
    if n.target is aten.scaled_dot_product_attention.default:
        is_values = n.args[2] is node and node not in n.args[:2]
    else:
        is_values = n.target in _PRODUCTS and n.args[1] is node and _is_softmax(n.args[0])
    if not is_values or not bool((ids == ids[..., :1, :]).all()) or ids.shape[:-2] != value.shape[:-2]:
        return None
    return ids[..., :1, :].expand(value.shape)


def _as_keys(n: Node, node: Node, ids: Tensor) -> bool:
    """Whether attention reads `node` as its keys [..., N, D] alone, each token with the same numbers."""
    if n.target is not aten.scaled_dot_product_attention.default:
        return False
    return [i for i, a in enumerate(n.args) if a is node] == [1] and bool((ids == ids[..., :1, :]).all())


def _is_softmax(value: object) -> bool:
    """Whether rows of a tensor sum to one: a softmax, moved about at most."""
    while isinstance(value, Node) and value.target in MOVES:
        value = value.args[0]
    return isinstance(value, Node) and value.target in _SOFTMAX
