"""Rewrites that leave the numbers alone and the graph smaller; one function each, run in FOLDS' order.

Every pass takes an Edit and changes it in place. tests/export/test_fold.py proves each on random inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.fx import Node

from vit_export.export.graph import Edit, aten, module_path, sole_user
from vit_export.export.tokens import drop_unread_tokens

_NO_OPS = (
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alias.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh_copy.default,
    aten.contiguous.default,
    aten._assert_tensor_metadata.default,
    aten._assert_async.msg,
)
_CASTS = (aten.to.dtype, aten.type_as.default, aten._to_copy.default)
# Operators that copy only shape, type and device from their input → the value they fill with.
_FILLED = {
    aten.new_zeros.default: 0, aten.new_ones.default: 1, aten.zeros_like.default: 0, aten.ones_like.default: 1
}  # fmt: skip
_ATTENTION = aten.scaled_dot_product_attention.default
_OF_MASKS = (aten.add.Tensor, aten.slice.Tensor)
_RANDOM = (aten.rand.default, aten.randn.default, aten.rand_like.default, aten.bernoulli.p)


def drop_no_ops(edit: Edit) -> None:
    """Remove dropout, alias, detach, contiguous, assertions, empty padding and casts to the same type.

    A view becomes a reshape, which does not depend on the strides that `contiguous` set.
    """
    for node in edit.nodes(aten.view.default, aten._unsafe_view.default):
        node.target = aten.reshape.default
    for node in edit.nodes(*_NO_OPS, aten.pad.default, *_CASTS):
        source = node.args[0]
        if node.target is aten.pad.default and any(node.args[1]):  # type: ignore[arg-type]
            continue
        if node.target in _CASTS and _dtype(node) is not _dtype(source):
            continue
        if node.users:
            edit.bypass(node, source)  # type: ignore[arg-type]
        else:
            edit.graph.erase_node(node)


def pool_as_mean(edit: Edit) -> None:
    """Adaptive average pooling to a single value is a mean, which more passes know."""
    dims = {aten.adaptive_avg_pool1d.default: 1, aten.adaptive_avg_pool2d.default: 2}
    for node in edit.nodes(*dims):
        if all(side == 1 for side in node.args[1]):  # type: ignore[union-attr]
            axes = list(range(-dims[node.target], 0))  # type: ignore[index]
            node.target, node.args = aten.mean.dim, (node.args[0], axes, True)


def _dtype(node: object) -> object:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value.dtype if isinstance(value, Tensor) else node


def fold_constants(edit: Edit) -> None:
    """Evaluate what depends on parameters alone: bias tables, joined biases, rotary tables.

    Only the last node of a constant chain becomes a tensor; it is named after its module and operator.
    """
    known: dict[Node, Tensor | tuple[Tensor, ...]] = {}
    for node in list(edit.graph.nodes):
        value = _evaluate(edit, node, known)
        if value is not None:
            known[node] = value
    for node, value in known.items():
        if node.op == "get_attr" or not isinstance(value, Tensor) or all(u in known for u in node.users):
            continue
        path = module_path(node)
        name = f"{path}.{node.name}" if path else node.name
        node.replace_all_uses_with(edit.constant(name.replace(" ", "_"), value, node))
    for node in reversed(known):  # explicitly: in-place operators are never dead to fx
        if not node.users:
            edit.graph.erase_node(node)


def _evaluate(
    edit: Edit, node: Node, known: dict[Node, Tensor | tuple[Tensor, ...]]
) -> Tensor | tuple[Tensor, ...] | None:
    if node.op == "get_attr":
        return edit.tensor(node)
    if node.target in _FILLED:
        return _filled(node)
    inputs = node.all_input_nodes
    if not callable(node.target) or node.target in _RANDOM or any(i not in known for i in inputs):
        return None
    if not inputs and not _makes_tensor(node):
        return None
    with torch.no_grad():
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: known[n])
        value = node.target(*args, **kwargs)
    return tuple(value) if isinstance(value, list) else value if isinstance(value, Tensor | tuple) else None


def _filled(node: Node) -> Tensor | None:
    """The zeros or ones of a `new_zeros` (torchvision's shift mask), None where the batch is in its shape."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not _static(tuple(value.shape)):
        return None
    return torch.full(tuple(value.shape), _FILLED[node.target], dtype=value.dtype)  # type: ignore[index]


def _makes_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def share_masks(edit: Edit) -> None:
    """Masks and biases repeated for every image are constants again, and masks that hide nothing go.

    transformers' models make a mask of the batch's size that lets every token see every other.
    """
    for expand in edit.nodes(aten.expand.default):
        value = edit.tensor(expand.args[0])
        sides: Sequence[int] = expand.args[1][1:]  # type: ignore[index, assignment]
        if value is None or len(sides) + 1 != value.ndim or len(value) != 1 or not _static(tuple(sides)):
            continue
        if _is_mask(expand):
            edit.bypass(expand, edit.constant(f"{expand.args[0]}_shared", value.expand(1, *sides), expand))
    for attention in edit.nodes(_ATTENTION):
        mask = edit.tensor(_arg(attention, 3) or attention.kwargs.get("attn_mask"))
        if mask is not None and mask.dtype is torch.bool and bool(mask.all()):
            attention.args = (*attention.args[:3], None, *attention.args[4:])
            attention.kwargs = {k: v for k, v in attention.kwargs.items() if k != "attn_mask"}


def _is_mask(node: Node) -> bool:
    """Whether attention alone reads a tensor, as mask or bias, maybe added to others or cut; it may then be
    the same for all images."""
    return bool(node.users) and all(
        node not in user.args[:3]
        if user.target is _ATTENTION
        else user.target in _OF_MASKS and _is_mask(user)
        for user in node.users
    )


def fold_batch_norm(edit: Edit) -> None:
    """Fold BatchNorm in inference into the convolution before it."""
    for norm in edit.nodes(aten.batch_norm.default):
        conv = norm.args[0]
        if not isinstance(conv, Node) or conv.target is not aten.conv2d.default or sole_user(conv) is None:
            continue
        weight, bias = edit.tensor(conv.args[1]), edit.tensor(_arg(conv, 2))
        gamma, beta, mean, var = (edit.tensor(_arg(norm, i)) for i in range(1, 5))
        if weight is None or mean is None or var is None:
            continue
        factor = torch.rsqrt(var + float(norm.args[7]))  # type: ignore[arg-type]
        factor = factor if gamma is None else factor * gamma
        shift = -mean * factor if beta is None else beta - mean * factor
        _scale_outputs(edit, conv, factor, shift if bias is None else bias * factor + shift)
        edit.bypass(norm, conv)


def fold_layer_scale(edit: Edit) -> None:
    """Fold a per-channel factor on the output of a linear (LayerScale) into its weight and bias."""
    for mul in edit.nodes(aten.mul.Tensor):
        for linear, other in (mul.args, mul.args[::-1]):
            factor = edit.tensor(other)
            if factor is None or not isinstance(linear, Node) or linear.target is not aten.linear.default:
                continue
            weight, bias = edit.tensor(linear.args[1]), edit.tensor(_arg(linear, 2))
            if weight is None or sole_user(linear) is None or factor.numel() != weight.shape[0]:
                continue
            if factor.shape[-1] != weight.shape[0]:  # broadcast along another axis than the channels
                continue
            factor = factor.reshape(-1)
            _scale_outputs(edit, linear, factor, None if bias is None else bias * factor)
            edit.bypass(mul, linear)
            break


def flatten_attention(edit: Edit) -> None:
    """Bring attention over five dimensions (Twins' and Hiera's windows) to the four that exporters take.

    [batch, windows, heads, tokens, channels] become [batch * windows, heads, tokens, channels] and back.
    """
    for node in edit.nodes(aten.scaled_dot_product_attention.default):
        values = [arg.meta.get("val") for arg in node.args[:3] if isinstance(arg, Node)]
        shapes = [tuple(value.shape) for value in values if isinstance(value, Tensor)]
        masked = _arg(node, 3) is not None or node.kwargs.get("attn_mask") is not None
        if masked or len(shapes) != 3 or any(len(s) != 5 or not _static(s[1:]) for s in shapes):
            continue
        flat = [
            edit.call(node, aten.reshape.default, arg, [-1, *shape[2:]])
            for arg, shape in zip(node.args[:3], shapes, strict=True)
        ]
        node.args = (*flat, *node.args[3:])
        with edit.graph.inserting_after(node):
            back = edit.graph.call_function(aten.reshape.default, (node, [-1, *shapes[0][1:4], shapes[2][4]]))
        back.meta = dict(node.meta)
        node.meta = {k: v for k, v in node.meta.items() if k != "val"}
        for user in set(node.users) - {back}:
            user.replace_input_with(node, back)


def _static(shape: tuple[object, ...]) -> bool:
    return all(isinstance(side, int) for side in shape)


def _scale_outputs(edit: Edit, node: Node, factor: Tensor, bias: Tensor | None) -> None:
    """Multiply the output channels of a linear or convolution and set its bias; shared weights are split."""
    weight = edit.tensor(node.args[1])
    assert weight is not None and isinstance(node.args[1], Node)
    scaled = weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
    _set_constant(edit, node, 1, str(node.args[1].target), scaled)
    if bias is not None:
        old = _arg(node, 2)
        name = str(old.target) if isinstance(old, Node) else f"{_stem(str(node.args[1].target))}bias"
        _set_constant(edit, node, 2, name, bias)


def _set_constant(edit: Edit, node: Node, index: int, name: str, value: Tensor) -> None:
    old = _arg(node, index)
    shared = sum(n.op == "get_attr" and n.target == name for n in edit.graph.nodes) > 1
    if isinstance(old, Node) and len(old.users) == 1 and not shared:
        edit.replace_tensor(old, value)
        return
    new = edit.constant(name, value, node)
    node.args = (*node.args[:index], new, *node.args[index + 1 :])


def _stem(weight: str) -> str:
    return weight.removesuffix("weight") if weight.endswith("weight") else f"{weight}_"


def _arg(node: Node, index: int) -> object:
    return node.args[index] if len(node.args) > index else None


FOLDS: tuple[Callable[[Edit], None], ...] = (
    drop_no_ops, pool_as_mean, fold_constants, share_masks, drop_unread_tokens, fold_constants,
    flatten_attention, fold_batch_norm, fold_layer_scale,
)  # fmt: skip
