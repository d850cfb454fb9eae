"""Channels around zero, so that float16 rounds what differs between tokens and not what they share.

float16 keeps eleven bits of a number, offset included. What all tokens have in common in a channel says
nothing that a bias could not say: it moves there, in float exactly. In two places:

- what a LayerNorm (or attention's values) gives to linears: (x - m) W + (b + m W). The product, which is
  stored before its bias is added, loses its offset too;
- the keys of attention: softmax of q k does not change when all keys move by one vector, so they lose
  their mean outright (Zhang et al. 2024, "SageAttention", arXiv 2410.02367, does it at run time; here once).

DINOv2-S, whose scores reach 299 while they differ by 4 (rms) within a row: docs/tensorrt.md has the gain.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from vit_export.artifacts import Images, Program
from vit_export.export.bias import change_bias, change_constant
from vit_export.export.channel_means import channel_means
from vit_export.export.channels import find_groups, find_keys
from vit_export.export.equalize import Equalization, equalize
from vit_export.export.graph import Edit, aten


def center(program: Program, images: Images) -> Program:
    """The same function with channel means moved into biases. images: float32 [n > 0, 3, H, W], measured."""
    groups, keys = find_groups(program), find_keys(program)
    means = _channel_means(program, {*keys, *(group.source for group in groups)}, images)
    shifts = [
        Equalization(group, torch.ones(group.size), _at(means[group.source], group.used()))
        for group in groups
    ]
    edit = Edit.of(program.graph)
    nodes = {node.name: node for node in edit.graph.nodes}
    layers = {layer.node: layer for layer in program.layers}
    for name, channels in keys.items():
        drop = _at(means[name], channels)
        if nodes[name].target is aten.layer_norm.default:
            change_constant(edit, nodes[name], 3, lambda bias, m=drop: bias - m)
        else:
            layers[name] = change_bias(edit, nodes[name], layers[name], lambda bias, m=drop: bias - m)
    changed = replace(program, graph=edit.build(), layers=tuple(layers.values()))
    return equalize(changed, shifts)


def _at(means: Tensor, channels: Tensor) -> Tensor:
    """float32 [C]: the means at `channels`, elsewhere 0."""
    kept = torch.zeros(len(means))
    kept[channels] = means[channels]
    return kept


def _channel_means(program: Program, nodes: set[str], images: Images) -> dict[str, Tensor]:
    """float32 [C] by node name, over images in batches that the program takes."""
    step = 1 if program.dynamic_batch else program.batch_size
    whole = np.resize(images, (-(-len(images) // step) * step, *images.shape[1:]))  # repeats the first ones
    batches = (whole[start : start + step] for start in range(0, len(whole), step))
    return {name: mean.float() for name, mean in channel_means(program.graph, nodes, batches).items()}
