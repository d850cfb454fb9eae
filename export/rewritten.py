"""What a search changed in a program, as tensors in a file: enough to make the same program again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import GraphModule

from vit_export.artifacts import Program
from vit_export.export.bias import change_bias
from vit_export.export.graph import Edit

_VALUE, _BIAS, _SCALE = "value/", "bias/", "scale/"  # of a constant, of a layer that had none, of a weight


def save_rewrite(before: Program, after: Program, path: Path) -> None:
    """Write the constants of `after` that differ from `before` (safetensors; empty when none does)."""
    from safetensors.torch import save_file

    old, new = _constants(before.graph), _constants(after.graph)
    added = {
        now.bias: was.name
        for was, now in zip(before.layers, after.layers, strict=True)
        if now.bias is not None and was.bias is None
    }
    tensors = {f"{_BIAS}{added[name]}": value for name, value in new.items() if name in added}
    tensors |= {
        f"{_VALUE}{name}": value
        for name, value in new.items()
        if name in old and old[name] is not value and not torch.equal(old[name], value)
    }
    tensors |= {f"{_SCALE}{name}": scale for name, scale in after.weight_scales.items()}
    save_file({name: value.detach().clone().contiguous() for name, value in tensors.items()}, path)


def apply_rewrite(program: Program, path: Path) -> Program:
    """The program that `save_rewrite` was given as `after`, from its `before`."""
    from safetensors.torch import load_file

    tensors = load_file(path)
    if not tensors:
        return program
    edit = Edit.of(program.graph)
    nodes = {node.name: node for node in edit.graph.nodes}
    layers = []
    for layer in program.layers:
        bias = tensors.get(f"{_BIAS}{layer.name}")
        layers.append(
            layer if bias is None else change_bias(edit, nodes[layer.node], layer, lambda _, b=bias: b)
        )
    edit.tensors.update(_named(tensors, _VALUE))
    scales = _named(tensors, _SCALE)
    return replace(program, graph=edit.build(), layers=tuple(layers), weight_scales=scales)


def _named(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _constants(graph: GraphModule) -> dict[str, Tensor]:
    return Edit.of(graph).tensors
