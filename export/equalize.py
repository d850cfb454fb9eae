"""Moving outlier channels from activations into weights: exact in float, far kinder to eight bits.

An input channel with ten times the range of the others costs all others three bits, for activations have
one scale a tensor. Dividing channel j by s_j and multiplying column j of the weight by s_j changes nothing
else (SmoothQuant, Xiao et al. 2023, equation 4: s_j = max|x_j|^alpha / max|W_j|^(1 - alpha)); subtracting the
middle of its range c_j and adding W c to the bias centres it (RepQ-ViT, Li et al. 2023, section 3.2). Where a
LayerNorm makes the channels both fold into its weight and bias; where attention passes values on, into the
rows of the linear that made them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.fx import Node

from vit_export.artifacts import Layer, Program
from vit_export.export.bias import change_bias, change_constant
from vit_export.export.channels import ChannelGroup
from vit_export.export.graph import Edit, aten
from vit_export.export.layers import constant

_FLOOR = 1e-5  # of a channel's range or weight against the largest: dead channels keep a finite factor


class Extremes(Protocol):
    """The range of each input channel of a layer: float32 [in], as calibration's ChannelStats hold it."""

    low: npt.NDArray[np.float32] | None
    high: npt.NDArray[np.float32] | None


@dataclass(frozen=True, slots=True, eq=False)
class Equalization:
    """Channels of one group become (x - shift) / scale. scale, shift: float32 [channels of the source]."""

    group: ChannelGroup
    scale: Tensor
    shift: Tensor

    def applied(self, layer: str, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The extremes of a consumer's input channels afterwards."""
        channels = next(c.channels for c in self.group.consumers if c.layer.name == layer)
        scale, shift = self.scale[channels], self.shift[channels]
        return (low - shift) / scale, (high - shift) / scale


def equalization(
    program: Program, group: ChannelGroup, extremes: Mapping[str, Extremes], alpha: float
) -> Equalization:
    """Factors and shifts of one group. alpha: 0 leaves ranges to the activations, 1 moves all of them.

    extremes: by layer name, of each consumer's input channels as calibration saw them.
    Factors have a geometric mean of 1 over the channels that are used.
    """
    low, high = torch.full((group.size,), torch.inf), torch.full((group.size,), -torch.inf)
    columns = torch.zeros(group.size)
    for consumer in group.consumers:
        seen, at = extremes[consumer.layer.name], consumer.channels
        low.scatter_reduce_(0, at, torch.as_tensor(seen.low), "amin")
        high.scatter_reduce_(0, at, torch.as_tensor(seen.high), "amax")
        columns.scatter_reduce_(0, at, _column_peaks(program, consumer.layer), "amax")
    used = group.used()
    reach, weight = _floored((high - low)[used] / 2), _floored(columns[used])
    factor = reach**alpha / weight ** (1 - alpha)
    scale, shift = torch.ones(group.size), torch.zeros(group.size)
    scale[used] = factor / factor.log().mean().exp()
    shift[used] = (low + high)[used] / 2
    return Equalization(group, scale, shift)


def equalize(program: Program, choices: Sequence[Equalization]) -> Program:
    """The same function with other channels; layer names stay. Float rounding is the only difference."""
    edit = Edit.of(program.graph)
    nodes = {node.name: node for node in edit.graph.nodes}
    layers = {layer.name: layer for layer in program.layers}
    for choice in choices:
        for consumer in choice.group.consumers:
            name = consumer.layer.name
            scale, shift = choice.scale[consumer.channels], choice.shift[consumer.channels]
            layers[name] = _absorb(edit, nodes[consumer.layer.node], layers[name], scale, shift)
        source = nodes[choice.group.source]
        if source.target is aten.layer_norm.default:
            change_constant(edit, source, 2, lambda weight, c=choice: weight / c.scale)
            change_constant(edit, source, 3, lambda bias, c=choice: (bias - c.shift) / c.scale)
        else:
            layer = next(one for one in layers.values() if one.node == choice.group.source)
            change_constant(edit, source, 1, lambda weight, c=choice: weight / c.scale[:, None])
            layers[layer.name] = change_bias(
                edit, source, layer, lambda bias, c=choice: (bias - c.shift) / c.scale
            )
    return replace(program, graph=edit.build(), layers=tuple(layers[layer.name] for layer in program.layers))


def _absorb(edit: Edit, node: Node, layer: Layer, scale: Tensor, shift: Tensor) -> Layer:
    """Give a consumer the weight and bias that undo the change of its input."""
    weight = edit.tensors[layer.weight]
    spatial = weight.reshape(*weight.shape[:2], -1).sum(-1)
    layer = change_bias(edit, node, layer, lambda bias: bias + spatial @ shift)
    change_constant(edit, node, 1, lambda w: w * scale.reshape(1, -1, *[1] * (w.ndim - 2)))
    return layer


def _column_peaks(program: Program, layer: Layer) -> Tensor:
    """max |W| of each input channel, float32 [in]."""
    weight = constant(program.graph, layer.weight)
    return weight.detach().abs().reshape(*weight.shape[:2], -1).amax(dim=(0, 2)).float()


def _floored(values: Tensor) -> Tensor:
    return values.clamp_min(float(values.max()) * _FLOOR or 1.0)
