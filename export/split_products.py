"""Cutting wide integer products in two or more, which OpenVINO's threads share more evenly (`blocks.py`).

Each part has some of the output channels; what treats every value by itself behind it (GELU, the next
product's quantiser) is repeated for each part, so that what is joined again are eight bits a value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node

from vit_export.artifacts import Program
from vit_export.export.blocks import narrow_parts
from vit_export.export.graph import Edit, aten, sole_user
from vit_export.export.linear_rows import take_channels
from vit_export.export.quantize import DEQUANTIZE, DEQUANTIZE_CHANNEL, QUANTIZE
from vit_export.export.token_rows import shape_of

_EACH = (aten.gelu.default, aten.relu.default, aten.silu.default, QUANTIZE, DEQUANTIZE)


def split_wide_products(program: Program, parts: Callable[[int, int], int] = narrow_parts) -> Program:
    """The same quantised program with its integer linears cut; every value is the same.

    parts: how many products one over so many rows to so many channels is cut into, of equal width.
    """
    edit = Edit.of(program.graph)
    for linear in edit.nodes(aten.linear.default):
        if _is_cut(linear) and (count := parts(*shape_of(linear)[1:])) > 1:
            _split(edit, linear, count)
    return replace(program, graph=edit.build())


def _is_cut(linear: Node) -> bool:
    """Whether a call is an integer linear over [batch, tokens, channels]."""
    shape, weight = shape_of(linear), linear.args[1]
    integer = isinstance(weight, Node) and weight.target is DEQUANTIZE_CHANNEL
    return integer and len(shape) == 3 and isinstance(shape[1], int)


def _split(edit: Edit, linear: Node, parts: int) -> None:
    ends = [linear, *_elementwise(edit, linear)]
    outputs = []
    for index in range(parts):
        source = _part(edit, linear, index, parts)
        for node in ends[1:]:
            source = _repeat(edit, node, source, index, parts)
        outputs.append(source)
    last = ends[-1]
    joined = edit.call(last.next, aten.cat.default, outputs, 2)
    joined.meta["val"] = last.meta["val"]
    last.replace_all_uses_with(joined)


def _elementwise(edit: Edit, node: Node) -> list[Node]:
    """The calls behind a node that treat each value by itself, as long as nobody reads what is between."""
    found = []
    user = sole_user(node)
    while user is not None and user.args[0] is node and (user.target in _EACH or _by_channel(edit, user)):
        found.append(user)
        node, user = user, sole_user(user)
    return found


def _part(edit: Edit, linear: Node, index: int, parts: int) -> Node:
    """One of the products, with its part of the output channels."""
    channels = torch.arange(shape_of(linear)[2]).chunk(parts)[index]
    part = take_channels(edit, linear, channels, linear.args[0])  # type: ignore[arg-type]
    value: Tensor = linear.meta["val"]
    part.meta["val"] = value.new_empty((*value.shape[:-1], len(channels)))
    return part


def _by_channel(edit: Edit, node: Node) -> bool:
    """Whether a call multiplies each channel by a constant of its own."""
    factor = edit.tensor(node.args[1]) if node.target is aten.mul.Tensor else None
    return factor is not None and factor.ndim == 1 and len(factor) == shape_of(node)[-1]


def _repeat(edit: Edit, node: Node, source: Node, index: int, parts: int) -> Node:
    """A call behind the whole product, behind one of its parts."""
    more = node.args[1:]
    if _by_channel(edit, node):
        factor = edit.tensor(more[0])
        assert factor is not None and isinstance(more[0], Node)
        part = factor.chunk(parts)[index].contiguous()
        more = (edit.constant(f"{more[0].target}_part_{index}", part, node),)
    copied = edit.call(node, node.target, source, *more)
    copied.kwargs = node.kwargs
    copied.meta["val"] = node.meta["val"].new_empty(source.meta["val"].shape)
    return copied
