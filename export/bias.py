"""Changing the bias of a layer, and the change that takes back what quantisation adds on average."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from vit_export.artifacts import Images, Layer, Program
from vit_export.export.channel_means import channel_means
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
    edit = Edit.of(program.graph)
    nodes = {node.name: node for node in edit.graph.nodes}
    inputs = {layer.node: str(nodes[layer.node].args[0]) for layer in linears}  # before Q/DQ
    means = channel_means(quantized, {*inputs, *inputs.values()}, batches)
    for layer in linears:
        seen, made = means[inputs[layer.node]], means[layer.node]
        weight, bias = (constant(original.graph, str(name)).detach() for name in (layer.weight, layer.bias))
        wanted = weight.double() @ seen + bias.double()
        change_bias(edit, nodes[layer.node], layer, lambda b, d=wanted - made: (b + d).float())
    return replace(program, graph=edit.build())
