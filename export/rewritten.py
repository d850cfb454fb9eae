"""A program that a search rewrote, as files: what differs from the traced one, so that it can be made again.

Searches change constants and which constants a call reads (a bias where there was none), never the
calls. So a folder holds `weights.safetensors` (tensors that are new or have other values, and the scales
that weights were rounded to) and `rewired.json` (calls that read other constants, and the layers).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import torch
from torch import Tensor
from torch.fx import Node

from vit_export.artifacts import Layer, Program
from vit_export.export.graph import Edit

_TENSOR, _SCALE = "tensor ", "scale "
_WEIGHTS, _WIRING = "weights.safetensors", "rewired.json"


class Wire(msgspec.Struct, frozen=True):
    """The call `node` reads the constant `target` as its argument `index`."""

    node: str
    index: int
    target: str


class Wiring(msgspec.Struct, frozen=True):
    """wires: those that the traced program does not have."""

    wires: tuple[Wire, ...]
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
    wiring = Wiring(tuple(sorted(wires, key=lambda wire: (wire.node, wire.index))), program.layers)
    (folder / _WIRING).write_bytes(msgspec.json.encode(wiring))


def load(traced: Program, folder: Path) -> Program:
    """The program that `save` was given, over the tensors that it shares with `traced`."""
    from safetensors.torch import load_file

    held = load_file(folder / _WEIGHTS)
    wiring = msgspec.json.decode((folder / _WIRING).read_bytes(), type=Wiring)
    edit = Edit.of(traced.graph)
    edit.tensors.update({k.removeprefix(_TENSOR): v for k, v in held.items() if k.startswith(_TENSOR)})
    nodes = {node.name: node for node in edit.graph.nodes}
    for wire in wiring.wires:
        node = nodes[wire.node]
        with edit.graph.inserting_before(node):
            constant = edit.graph.get_attr(wire.target)
        arguments = [*node.args, *[None] * (wire.index + 1 - len(node.args))]
        arguments[wire.index] = constant
        node.args = tuple(arguments)
    scales = {k.removeprefix(_SCALE): v for k, v in held.items() if k.startswith(_SCALE)}
    return replace(traced, graph=edit.build(), layers=wiring.layers, weight_scales=scales)


def _wires(edit: Edit) -> list[Wire]:
    """Every constant that a call reads."""
    return [
        Wire(node.name, index, str(value.target))
        for node in edit.graph.nodes
        if node.op == "call_function"
        for index, value in enumerate(node.args)
        if isinstance(value, Node) and value.op == "get_attr"
    ]


def _same(now: Tensor, before: Tensor | None) -> bool:
    return before is not None and (now is before or (now.shape == before.shape and torch.equal(now, before)))
