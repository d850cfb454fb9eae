"""Rounding weights so that the errors of one row cancel on the inputs the layer really sees (GPTQ)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor
from torch.fx import Node

from vit_export.artifacts import Program, QuantPlan
from vit_export.export.graph import Edit
from vit_export.export.layers import constant
from vit_export.export.quantize import weight_scale

_DAMP = 0.01  # of the mean diagonal, as in the paper
_BLOCK = 128  # columns between updates of all later ones


class Correlation(Protocol):
    """Sum of outer products of a layer's input rows: float32 [in, in]."""

    @property
    def products(self) -> Tensor:
        """The sum."""


def round_weights(program: Program, plan: QuantPlan, inputs: Mapping[str, Correlation]) -> Program:
    """The program with every quantised linear's weight on its grid; `weight_scales` says which.

    inputs: by layer name. Layers that read the same tensor share one Correlation, whose factor is made once.
    A layer without one, a convolution or a weight that two layers share is left to nearest rounding.
    """
    edit = Edit.of(program.graph)
    nodes = {node.name: node for node in edit.graph.nodes}
    factors: dict[int, Tensor] = {}
    scales = dict(program.weight_scales)
    planned = {layer.name: layer for layer in plan.layers if layer.quantized}
    for layer in program.layers:
        weight_node = nodes[layer.node].args[1]
        assert isinstance(weight_node, Node)
        seen = inputs.get(layer.name)
        if layer.kind != "linear" or seen is None or layer.name not in planned or len(weight_node.users) > 1:
            continue
        if id(seen) not in factors:
            factors = {id(seen): inverse_factor(seen.products)}  # only the latest: they are large
        weight = constant(program.graph, layer.weight).detach()
        bits = planned[layer.name].weight_bits
        scale = weight_scale(weight, bits, planned[layer.name].group)
        edit.replace_tensor(weight_node, gptq(weight, scale, factors[id(seen)], bits))
        scales[layer.weight] = scale
    return replace(program, graph=edit.build(), weight_scales=scales)


def inverse_factor(products: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of a damped correlation matrix, float64 [in, in]."""
    damped = products.double()
    mean = float(damped.diagonal().mean()) or 1.0
    damped.diagonal().add_(_DAMP * mean)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def gptq(weight: Tensor, scale: Tensor, factor: Tensor, bits: int = 8) -> Tensor:
    """Weights [out, in] on the grid of `scale` [out] or [out, groups of columns]; each column's error is made
    good by later columns.

    Frantar et al. 2023, "GPTQ: accurate post-training quantization for generative pre-trained transformers",
    algorithm 1, columns in their own order. factor: `inverse_factor` of the layer's inputs.
    Returns float32; every value is a multiple of its row's (or group's) scale.
    """
    limit = 2 ** (bits - 1) - 1
    left = weight.double().clone()
    groups = scale.double().reshape(len(weight), -1)
    steps = groups.repeat_interleave(weight.shape[1] // groups.shape[1], dim=1)
    result = torch.empty_like(left)
    columns = left.shape[1]
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        errors = torch.empty(len(left), stop - start, dtype=left.dtype)
        for column in range(start, stop):
            step = steps[:, column]
            codes = (left[:, column] / step).round_().clamp_(-limit, limit)
            result[:, column] = codes * step
            error = (left[:, column] - result[:, column]) / factor[column, column]
            left[:, column:stop] -= error[:, None] * factor[column, column:stop]
            errors[:, column - start] = error
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return result.float()
