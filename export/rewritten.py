"""A program that a search rewrote, as files: what differs from the traced one, so that it can be made again.

Searches change constants, which constants a call reads (a bias where there was none), and put a call of
their own between two (outliers divided, a stream turned back). So a folder holds `weights.safetensors`
(tensors that are new or have other values, and the scales that weights were rounded to) and `rewired.json`
(calls that are new or read something else, and the layers).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import msgspec
import torch
from torch import Tensor
from torch.fx import Node

from vit_export.artifacts import Layer, Program
from vit_export.export.graph import Edit, like_its_input

_TENSOR, _SCALE = "tensor ", "scale "
_WEIGHTS, _WIRING = "weights.safetensors", "rewired.json"


class Wire(msgspec.Struct, frozen=True):
    """The call `node` reads the constant `target`, or what the call `target` gives, as argument `index`."""

    node: str
    index: int
    target: str
    constant: bool


class Insertion(msgspec.Struct, frozen=True):
    """A call of an ATen operator (`aten.mul.Tensor`) in front of another; its arguments are all wires."""

    name: str
    operator: str
    before: str


class Wiring(msgspec.Struct, frozen=True):
    """wires, insertions: those that the traced program does not have."""

    wires: tuple[Wire, ...]
    insertions: tuple[Insertion, ...]
    layers: tuple[Layer, ...]


def save(program: Program, traced: Program, folder: Path) -> None:
    """Write what makes `program` out of `traced`."""
    from safetensors.torch import save_file

    now, before = Edit.of(program.graph), Edit.of(traced.graph)
    wires = set(_wires(now)) - set(_wires(before))
    read = {str(node.target) for node in now.graph.find_nodes(op="get_attr")}
    changed = {
        name: now.tensors[name] for name in read if not _same(now.tensors[name], before.tensors.get(name))
    }
    held = {f"{_TENSOR}{name}": value.detach().clone().contiguous() for name, value in changed.items()}
    held |= {f"{_SCALE}{name}": value.clone().contiguous() for name, value in program.weight_scales.items()}
    save_file(dict(sorted(held.items())), folder / _WEIGHTS)
    inserted = tuple(_insertions(now, {node.name for node in before.graph.nodes}))
    wiring = Wiring(tuple(sorted(wires, key=lambda wire: (wire.node, wire.index))), inserted, program.layers)
    (folder / _WIRING).write_bytes(msgspec.json.encode(wiring))


def load(traced: Program, folder: Path) -> Program:
    """The program that `save` was given, over the tensors that it shares with `traced`."""
    from safetensors.torch import load_file

    held = load_file(folder / _WEIGHTS)
    wiring = msgspec.json.decode((folder / _WIRING).read_bytes(), type=Wiring)
    edit = Edit.of(traced.graph)
    edit.tensors.update({k.removeprefix(_TENSOR): v for k, v in held.items() if k.startswith(_TENSOR)})
    nodes = {node.name: node for node in edit.graph.nodes}
    for new in wiring.insertions:
        nodes[new.name] = edit.call(nodes[new.before], attrgetter(new.operator)(torch.ops))
    for wire in wiring.wires:
        node = nodes[wire.node]
        arguments = [*node.args, *[None] * (wire.index + 1 - len(node.args))]
        arguments[wire.index] = edit.read(wire.target, node) if wire.constant else nodes[wire.target]
        node.args = tuple(arguments)
    for new in wiring.insertions:
        like_its_input(nodes[new.name])
    scales = {k.removeprefix(_SCALE): v for k, v in held.items() if k.startswith(_SCALE)}
    return replace(traced, graph=edit.build(), layers=wiring.layers, weight_scales=scales)


def _wires(edit: Edit) -> list[Wire]:
    """Everything that a call reads."""
    return [
        _wire(node, index, value)
        for node in edit.graph.nodes
        if node.op == "call_function"
        for index, value in enumerate(node.args)
        if isinstance(value, Node)
    ]


def _wire(node: Node, index: int, value: Node) -> Wire:
    constant = value.op == "get_attr"
    return Wire(node.name, index, str(value.target) if constant else value.name, constant)


def _insertions(edit: Edit, known: Collection[str]) -> Iterator[Insertion]:
    """Calls that are not among the known ones, each with the next call behind it that is."""
    waiting: list[Node] = []
    for node in edit.graph.nodes:
        if node.op == "call_function" and node.name not in known:
            assert all(isinstance(value, Node) for value in node.args) and not node.kwargs
            waiting.append(node)
        elif node.op != "get_attr":
            yield from (Insertion(new.name, str(new.target), node.name) for new in waiting)
            waiting = []


def _same(now: Tensor, before: Tensor | None) -> bool:
    return before is not None and (now is before or (now.shape == before.shape and torch.equal(now, before)))
