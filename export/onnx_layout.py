"""Tokens to feature maps and back in one Transpose of an image, [B, H, W, C] ↔ [B, C, H, W].

Models write [B, N, C] → Transpose → Reshape to [B, C, H, W]. With the Reshape first the Transpose is that
between channels last and channels first, which ONNX Runtime and OpenVINO take into the convolution beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from vit_export.export.onnx_edit import like, only_user, replace, shape_initializer


def transpose_images(model: ir.Model) -> None:
    """Swap Transpose and Reshape between tokens and feature maps, in place. Exact."""
    for node in list(model.graph):
        if node.op_type == "Reshape" and (tokens := _tokens(node)) is not None:
            channels, height, width = _sides(node.outputs[0])
            image = _reshape(model, node, tokens, (height, width, channels))
            replace(node, like(node, "Transpose", [image], {"perm": [0, 3, 1, 2]}).outputs[0])
        elif _swaps(node) and (image := _image(node)) is not None:
            turned = like(node, "Transpose", [image], {"perm": [0, 2, 3, 1]}).outputs[0]
            replace(node, _reshape(model, node, turned, _sides(node.outputs[0])))


def _tokens(reshape: ir.Node) -> ir.Value | None:
    """The [B, N, C] that a Transpose and this Reshape make [B, C, H, W] of."""
    given = reshape.inputs[0]
    source = given.producer() if given is not None else None
    if source is None:
        return None
    alone = _swaps(source) and only_user(source.outputs[0]) is reshape
    return source.inputs[0] if alone and _flat(source.outputs[0], reshape.outputs[0]) else None


def _image(transpose: ir.Node) -> ir.Value | None:
    """The [B, C, H, W] that a Reshape and this Transpose make [B, N, C] of."""
    source = transpose.inputs[0].producer() if transpose.inputs[0] is not None else None
    if source is None or source.op_type != "Reshape" or source.inputs[0] is None:
        return None
    return source.inputs[0] if _flat(source.outputs[0], source.inputs[0]) else None


def _swaps(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and list(node.attributes.get_ints("perm", ())) == [0, 2, 1]


def _flat(rows: ir.Value, image: ir.Value) -> bool:
    """Whether [B, C, N] and [B, C, H, W] are the same values in the same order."""
    flat, sides = rows.shape, image.shape
    known = len(_sides(rows)) == 2 and len(_sides(image)) == 3
    return known and flat is not None and sides is not None and flat[0] == sides[0] and flat[1] == sides[1]


def _sides(value: ir.Value) -> list[int]:
    """Sides behind the batch; fewer where they are not known."""
    return [side for side in list(value.shape or ())[1:] if isinstance(side, int)]


def _reshape(model: ir.Model, node: ir.Node, value: ir.Value, sides: Sequence[int]) -> ir.Value:
    """[B, ...] with these sides behind the batch."""
    made = like(node, "Reshape", [value, shape_initializer(model, (0, *sides))]).outputs[0]
    made.shape = ir.Shape([next(iter(value.shape or (None,))), *sides])
    made.type = node.outputs[0].type
    return made
