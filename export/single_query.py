"""Attention of a single query without keys and values: a last block of which the class token alone is read.

One query asks every token the same question, so it can be asked of the tokens themselves:
q . (Wk x + bk) = (Wk' q) . x + q . bk, whose last term softmax discards, and
sum a (Wv x + bv) = Wv (sum a x) + bv, since the weights a sum to 1. So two products over all tokens become
one over a head's query and one over a head's mean of tokens. Exact but for rounding, also with quantised
weights and inputs, whose real values are multiplied. Where queries, keys or values are changed on the way
(rotary positions, a norm), attention stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from vit_export.artifacts import Program
from vit_export.export.channels import MOVES
from vit_export.export.graph import Edit, aten
from vit_export.export.linear_rows import can_take_channels, channel_bias, channel_weight, take_channels
from vit_export.export.quantize import DEQUANTIZE
from vit_export.export.token_rows import argument, shape_of

_FEWEST = 8  # keys: with fewer there is nothing to gain


@dataclass(frozen=True, slots=True)
class _Heads:
    """What attention reads of a linear. token: the one for a query; channels: int64 [heads, D]."""

    linear: Node
    channels: Tensor
    token: int | None = None


def merge_single_query(program: Program) -> Program:
    """The same program with single queries asked of the tokens; nothing changes where there are none."""
    edit = Edit.of(program.graph)
    for attention in edit.nodes(aten.scaled_dot_product_attention.default):
        query, keys, values = (_heads(argument(attention, index)) for index in range(3))
        if query and keys and values and query.token is not None and not _is_restricted(attention):
            edit.bypass(attention, _ask(edit, attention, query, keys, values))
    return replace(program, graph=edit.build())


def _is_restricted(attention: Node) -> bool:
    """Whether there is a mask or a bias, or a causal order."""
    names = ("attn_mask", "dropout_p", "is_causal")
    given = [argument(attention, 3 + i, attention.kwargs.get(name)) for i, name in enumerate(names)]
    return any(value is not None and value is not False and value != 0.0 for value in given)


def _heads(value: Any) -> _Heads | None:
    """Where [B, heads, tokens, D] comes from, if a linear [B, N, C] made it and it was only moved since.

    Tokens are all of the linear's in their order, or one of them.
    """
    moves: list[Node] = []
    while isinstance(value, Node) and value.target in MOVES:
        moves.append(value)
        value = value.args[0]
    if not isinstance(value, Node) or not can_take_channels(value) or len(shape_of(value)) != 3:
        return None
    tokens, width = shape_of(value)[1:]
    if not isinstance(tokens, int):  # [N, B, C]
        return None
    numbers: Any = torch.arange(tokens * width).reshape(1, tokens, width)
    for move in reversed(moves):
        args, kwargs = map_arg((move.args[1:], move.kwargs), lambda _: 1)  # a batch of one
        numbers = move.target(numbers, *args, **kwargs)  # type: ignore[operator]
    if numbers.ndim != 4 or len(numbers) != 1:
        return None
    return _read(value, numbers[0] // width, numbers[0] % width)


def _read(linear: Node, tokens: Tensor, channels: Tensor) -> _Heads | None:
    """tokens, channels: of each value of a [heads, tokens, D] tensor."""
    one = channels[:, :1]
    if not torch.equal(channels, one.expand_as(channels)):
        return None
    if tokens.shape[1] == 1 and bool((tokens == tokens[0, 0, 0]).all()):
        return _Heads(linear, one[:, 0], int(tokens[0, 0, 0]))
    order = torch.arange(shape_of(linear)[1])[None, :, None]
    whole = tokens.shape[1] >= _FEWEST and torch.equal(tokens, order.expand_as(tokens))
    return _Heads(linear, one[:, 0]) if whole else None


def _ask(edit: Edit, attention: Node, query: _Heads, keys: _Heads, values: _Heads) -> Node:
    """[B, heads, 1, D]; attention.args are not read any more."""
    call = partial(edit.call, attention)
    heads, size = query.channels.shape
    width = int(shape_of(keys.linear.args[0])[-1])
    scale = argument(attention, 6, attention.kwargs.get("scale")) or size**-0.5
    asked = take_channels(edit, query.linear, query.channels.flatten(), _one_token(edit, query))
    asked = call(aten.reshape.default, asked, [-1, heads, 1, size])
    weight = _by_head(edit, attention, keys, scale)
    asked = call(aten.reshape.default, call(aten.matmul.default, asked, weight), [-1, heads, width])
    scores = call(aten.matmul.default, asked, call(aten.transpose.int, keys.linear.args[0], 1, 2))
    means = call(aten.matmul.default, call(aten.softmax.int, scores, -1), values.linear.args[0])
    means = call(aten.reshape.default, means, [-1, heads, int(shape_of(values.linear.args[0])[-1]), 1])
    answer = call(aten.matmul.default, _by_head(edit, attention, values, 1.0), means)
    answer = call(aten.reshape.default, answer, [-1, heads, 1, values.channels.shape[1]])
    bias = channel_bias(edit, values.linear, values.channels)
    if bias is None:
        return answer
    constant = edit.constant(f"{values.linear.name}_value_bias", bias[None, :, None], attention)
    return call(aten.add.Tensor, answer, constant)


def _by_head(edit: Edit, before: Node, part: _Heads, factor: float) -> Node:
    """The weight behind keys or values: [1, heads, D, in]."""
    weight = channel_weight(edit, part.linear, part.channels.flatten(), factor)
    width = int(shape_of(part.linear.args[0])[-1])
    return edit.call(before, aten.reshape.default, weight, [1, *part.channels.shape, width])


def _one_token(edit: Edit, query: _Heads) -> Node:
    """The linear's input for the token that asks, [B, 1, in]; cut in front of its quantiser."""
    token, source = query.token, query.linear.args[0]
    assert token is not None and isinstance(source, Node)
    pair = [source, source.args[0]] if source.target is DEQUANTIZE else []
    real = pair[-1].args[0] if pair else source  # type: ignore[union-attr]
    row = edit.call(query.linear, aten.slice.Tensor, real, 1, token, token + 1)
    for node in reversed(pair):
        assert isinstance(node, Node)
        row = edit.call(query.linear, node.target, row, *node.args[1:])
    return row
