"""Changes to a program before it becomes a Core ML package: input, outputs, and which quantisation stays."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch.fx import Node

from vit_export.artifacts import Preprocessing, Program
from vit_export.export.coreml_options import CoreMLOptions
from vit_export.export.graph import Edit, aten

_q = torch.ops.quantized_decomposed


def prepared(program: Program, options: CoreMLOptions, preprocessing: Preprocessing) -> Program:
    """The program with the asked input and outputs, and the quantisation the package is to keep."""
    if options.palettize:
        program = float_weights(program)
    if options.target == "iOS17":
        program = unsigned_weights(program)
    if options.labels:
        program = add_probabilities(program)
    if options.input == "image":
        program = take_pixels(program, preprocessing)
    return program


def take_pixels(program: Program, preprocessing: Preprocessing) -> Program:
    """Normalise inside the graph: the input becomes RGB in 0..255, still NCHW float32.

    The same float32 arithmetic as `Preprocessing.normalize`, one product and one sum a channel.
    """
    edit = Edit.of(program.graph)
    image = next(iter(edit.graph.find_nodes(op="placeholder")))
    first = image.next
    std, mean = (torch.tensor(v, dtype=torch.float64) for v in (preprocessing.std, preprocessing.mean))
    scale = edit.constant("preprocessing.scale", _channels(1 / (255 * std)), first)
    shift = edit.constant("preprocessing.shift", _channels(-mean / std), first)
    scaled = edit.call(first, aten.mul.Tensor, image, scale)
    normal = edit.call(first, aten.add.Tensor, scaled, shift)
    image.replace_all_uses_with(normal, delete_user_cb=lambda user: user is not scaled)
    return replace(program, graph=edit.build())


def add_probabilities(program: Program) -> Program:
    """A second output, softmax of the first: what a classifier's labels are attached to."""
    edit = Edit.of(program.graph)
    output = next(iter(edit.graph.find_nodes(op="output")))
    logits = output.args[0]
    output.args = ((logits, edit.call(output, aten.softmax.int, logits, -1)),)
    return replace(program, graph=edit.build())


def float_weights(program: Program) -> Program:
    """Replace quantised weights by the float32 values they stand for; activations stay quantised."""
    edit = Edit.of(program.graph)
    for node in edit.nodes(_q.dequantize_per_channel.default):
        _restore(edit, node, node)
    return replace(program, graph=edit.build())


def float_groups(program: Program) -> tuple[Program, tuple[str, ...]]:
    """The same for weights quantised in groups of columns alone, and their names: `blocks` stores them."""
    edit, names = Edit.of(program.graph), []
    for node in edit.nodes(_q.dequantize_per_channel.default):
        whole = next((user for user in node.users if user.target is aten.reshape.default), None)
        if whole is not None:
            names.append(_restore(edit, node, whole))
    return replace(program, graph=edit.build()), tuple(names)


def _restore(edit: Edit, node: Node, whole: Node) -> str:
    """Let the users of `whole`, a dequantised weight in its own shape, read float32 values; its name."""
    source, stored = _stored(edit, node)
    if not stored.dtype.is_floating_point:  # a shared weight is replaced once
        scale, zero = edit.tensor(node.args[1]), edit.tensor(node.args[2])
        value = _q.dequantize_per_channel.default(stored, scale, zero, *node.args[3:])
        edit.replace_tensor(source, value if whole is node else value.reshape(whole.args[1]))
    edit.bypass(whole, source)
    return str(source.target)


def unsigned_weights(program: Program) -> Program:
    """int8 weights around 0 as uint8 around 128, the same numbers; see `coreml_gaps`."""
    edit = Edit.of(program.graph)
    for node in edit.nodes(_q.dequantize_per_channel.default):
        source, stored = _stored(edit, node)
        zero = node.args[2]
        middle = edit.tensor(zero)
        assert isinstance(zero, Node) and middle is not None
        if stored.dtype is torch.int8:
            edit.replace_tensor(source, (stored.to(torch.int16) + 128).to(torch.uint8))
            edit.replace_tensor(zero, middle + 128)
        node.args = (*node.args[:4], 0, 255, torch.uint8)
    return replace(program, graph=edit.build())


def _stored(edit: Edit, node: Node) -> tuple[Node, torch.Tensor]:
    """The weight that a dequantisation reads: its node and its tensor."""
    source = node.args[0]
    stored = edit.tensor(source)
    assert isinstance(source, Node) and stored is not None
    return source, stored


def _channels(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.float32).reshape(1, 3, 1, 1)
