"""Products with some of the output channels of a linear, float or quantised, over the same stored weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from vit_export.export.graph import Edit, aten
from vit_export.export.quantize import DEQUANTIZE_CHANNEL


def can_take_channels(linear: Node) -> bool:
    """Whether a call is a linear whose weight has a scale an output channel, or is float."""
    weight = linear.args[1] if linear.target is aten.linear.default else None
    return isinstance(weight, Node) and (weight.op == "get_attr" or weight.target is DEQUANTIZE_CHANNEL)


def take_channels(edit: Edit, linear: Node, channels: Tensor, source: Node) -> Node:
    """A linear over `source` [..., in] that gives `channels` (int64 [C]) of what `linear` would give."""
    arguments = [source, channel_weight(edit, linear, channels)]
    if (bias := channel_bias(edit, linear, channels)) is not None:
        arguments.append(edit.constant(f"{linear.name}_bias", bias, linear))
    return edit.call(linear, aten.linear.default, *arguments)


def channel_weight(edit: Edit, linear: Node, channels: Tensor, factor: float = 1.0) -> Node:
    """The real weight [C, in] of some output channels, times a factor; stored as the linear's own is."""
    weight = linear.args[1]
    assert isinstance(weight, Node)
    if weight.target is not DEQUANTIZE_CHANNEL:
        value = _value(edit, weight)[channels]
        return edit.constant(f"{weight.target}_rows", value * factor if factor != 1.0 else value, linear)
    stored, scale, zero_point = (_value(edit, constant)[channels] for constant in weight.args[:3])
    name = str(weight.args[0].target)  # type: ignore[union-attr]
    values = {"rows": stored, "rows_scale": scale * factor, "rows_zero_point": zero_point}
    constants = [edit.constant(f"{name}_{what}", value, linear) for what, value in values.items()]
    return edit.call(linear, DEQUANTIZE_CHANNEL, *constants, *weight.args[3:])


def channel_bias(edit: Edit, linear: Node, channels: Tensor) -> Tensor | None:
    """float [C], None for a linear without a bias."""
    bias = linear.args[2] if len(linear.args) > 2 else None
    return None if bias is None else _value(edit, bias)[channels]


def _value(edit: Edit, node: object) -> Tensor:
    value = edit.tensor(node)
    assert isinstance(value, torch.Tensor)
    return value
