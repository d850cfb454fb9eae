"""Changing the bias of a layer, and the change that takes back what quantisation adds on average."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from vit_export.artifacts import Images, Layer, Program
from vit_export.export.graph import Edit
from vit_export.export.layers import constant


class Change(Protocol):
    """A new value for a constant."""

    def __call__(self, value: Tensor, /) -> Tensor: ...


def change_bias(edit: Edit, node: Node, layer: Layer, change: Change) -> Layer:
    """Change the bias of a layer, which gets one if it has none; the layer as it is then."""
    if layer.bias is not None:
        change_constant(edit, node, 2, change)
        return replace(layer, bias=str(node.args[2].target))  # type: ignore[union-attr]
    made = edit.constant(f"{layer.name}.bias", change(torch.zeros(layer.shape[0])), node)
    node.args = (*node.args[:2], made, *node.args[3:])
    return replace(layer, bias=str(made.target))


def change_constant(edit: Edit, node: Node, index: int, change: Change) -> None:
    """Give the constant that `node` reads as its argument `index` a new value, for this node alone."""
    held = node.args[index]
    assert isinstance(held, Node)
    value = change(edit.tensors[str(held.target)].detach())
    if len(held.users) == 1:
        edit.replace_tensor(held, value)
    else:
        made = edit.constant(str(held.target), value, node)
        node.args = (*node.args[:index], made, *node.args[index + 1 :])


def correct_biases(
    program: Program, original: Program, quantized: GraphModule, batches: Iterable[Images]
) -> Program:
    """`program` with biases that cancel the mean error of each quantised linear.

    program: what `quantized` was made of; original: the same layers with unrounded weights. The error is that
    of the layer on the inputs it meets in the quantised network (Nagel et al. 2019, "Data-free quantization
    through weight equalization and bias correction", section 4.2, with measured instead of assumed inputs).
    batches: float32 [n, 3, H, W].
    """
    linears = tuple(layer for layer in program.layers if layer.kind == "linear" and layer.bias is not None)
    watch = _Means(quantized, program, linears)
    with torch.inference_mode():
        for images in batches:
            watch.run(torch.from_numpy(images))
    edit = Edit.of(program.graph)
    nodes = {node.name: node for node in edit.graph.nodes}
    for layer in linears:
        seen, made = watch.means(layer)
        weight, bias = (constant(original.graph, str(name)).detach() for name in (layer.weight, layer.bias))
        wanted = weight.double() @ seen + bias.double()
        change_bias(edit, nodes[layer.node], layer, lambda b, d=wanted - made: (b + d).float())
    return replace(program, graph=edit.build())


class _Means(Interpreter):
    """Means over images and tokens of what each linear is given (before Q/DQ) and gives, float64 [C]."""

    def __init__(self, quantized: GraphModule, program: Program, linears: Iterable[Layer]) -> None:
        super().__init__(quantized)
        nodes = {node.name: node for node in program.graph.graph.nodes}
        self._inputs = {layer.node: nodes[layer.node].args[0].name for layer in linears}
        self._wanted = {*self._inputs, *self._inputs.values()}
        self._sums: dict[str, Tensor] = {}
        self._rows: dict[str, int] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.name in self._wanted:
            rows = value.reshape(-1, value.shape[-1])
            self._sums[n.name] = self._sums.get(n.name, 0) + rows.sum(0, dtype=torch.float64)
            self._rows[n.name] = self._rows.get(n.name, 0) + len(rows)
        return value

    def means(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """(of the input, of the output) of a layer."""
        source, made = (
            self._sums[name] / self._rows[name] for name in (self._inputs[layer.node], layer.node)
        )
        return source, made
