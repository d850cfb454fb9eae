"""MIL operations with arithmetic over more than one element: products, convolution, normalisation, attention.

All take and return float32 (values of type fp16 are float32 arrays that hold fp16 numbers): sums are
accumulated in float32 and the interpreter rounds each result once to the declared type. Parameter names
and defaults are those of the MIL operator reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vit_export.errors import UnsupportedOperator
from vit_export.runtime.mil_constexpr import along
from vit_export.runtime.mil_weights import Array


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """x [..., K] by weight [N, K], plus bias [N]."""
    rows: Array = x.reshape(-1, x.shape[-1]) @ weight.T
    if bias is not None:
        rows += bias
    return rows.reshape(*x.shape[:-1], weight.shape[0])


def matmul(x: Array, y: Array, transpose_x: bool = False, transpose_y: bool = False) -> Array:
    """Batched product of the last two dimensions, either side transposed first."""
    return np.asarray(_transposed(x, transpose_x) @ _transposed(y, transpose_y))


def einsum(values: tuple[Array, ...], equation: str) -> Array:
    """Sum of products in the notation of numpy's einsum."""
    return np.asarray(np.einsum(equation, *values, optimize=True))


def conv(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    strides: Array | None = None,
    pad_type: str = "valid",
    pad: Array | None = None,
    dilations: Array | None = None,
    groups: int = 1,
) -> Array:
    """2-D convolution of x [N, C, H, W] with weight [O, C/groups, h, w], as a product of patches."""
    if x.ndim != 4:
        raise UnsupportedOperator(f"Core ML conv of a {x.ndim - 2}-D image is not supported here")
    steps = (1, 1) if strides is None else (int(strides[0]), int(strides[1]))
    spacing = (1, 1) if dilations is None else (int(dilations[0]), int(dilations[1]))
    out_channels, _, height, width = weight.shape
    extent = (spacing[0] * (height - 1) + 1, spacing[1] * (width - 1) + 1)
    padded = np.pad(x, ((0, 0), (0, 0), *_padding(pad_type, pad, x.shape[2:], extent, steps)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, extent, axis=(2, 3))
    windows = windows[:, :, :: steps[0], :: steps[1], :: spacing[0], :: spacing[1]]
    batch, channels, rows, columns = windows.shape[:4]
    patches = windows.reshape(batch, groups, channels // groups, rows, columns, height, width)
    patches = patches.transpose(1, 0, 3, 4, 2, 5, 6).reshape(groups, batch * rows * columns, -1)
    kernels = weight.reshape(groups, out_channels // groups, -1)
    products = (patches @ kernels.transpose(0, 2, 1)).reshape(groups, batch, rows, columns, -1)
    result: Array = products.transpose(1, 0, 4, 2, 3).reshape(batch, out_channels, rows, columns)
    if bias is not None:
        result += bias[:, None, None]
    return result


def layer_norm(
    x: Array,
    axes: Array | None = None,
    gamma: Array | None = None,
    beta: Array | None = None,
    epsilon: float = 1e-5,
) -> Array:
    """(x - mean) / sqrt(variance + epsilon) * gamma + beta over `axes` (default all)."""
    over = tuple(range(x.ndim)) if axes is None else tuple(int(axis) % x.ndim for axis in axes)
    shape = [size if i in over else 1 for i, size in enumerate(x.shape)]
    centred = x - x.mean(over, keepdims=True)
    normal: Array = centred / np.sqrt(np.square(centred).mean(over, keepdims=True) + np.float32(epsilon))
    if gamma is not None:
        normal = normal * gamma.reshape(shape)
    return normal if beta is None else normal + beta.reshape(shape)


def batch_norm(
    x: Array,
    mean: Array,
    variance: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    epsilon: float = 1e-5,
) -> Array:
    """Normalise x [N, C, ...] with stored statistics [C]."""
    scale = 1.0 / np.sqrt(variance + np.float32(epsilon))
    if gamma is not None:
        scale = scale * gamma
    shift = -mean * scale if beta is None else beta - mean * scale
    return x * along(scale, x, 1) + along(shift, x, 1)


def softmax(x: Array, axis: int = -1) -> Array:
    """exp(x) / sum(exp(x)) along `axis`, after taking off the maximum."""
    powers = np.exp(x - x.max(axis, keepdims=True))
    return np.asarray(powers / powers.sum(axis, keepdims=True))


def scaled_dot_product_attention(
    query: Array, key: Array, value: Array, attn_mask: Array | None = None
) -> Array:
    """softmax(query key^T / sqrt(E) + mask) value; False in a boolean mask forbids a position.

    Scores and weights stay float32 between the two products, as a fused kernel keeps them.
    """
    scores = (query @ key.swapaxes(-1, -2)) / np.sqrt(np.float32(query.shape[-1]))
    if attn_mask is not None:
        mask = np.where(attn_mask, 0.0, -np.inf) if attn_mask.dtype == np.bool_ else attn_mask
        scores = scores + mask.astype(np.float32)
    return np.asarray(softmax(scores) @ value)


def quantize(
    input: Array, scale: Array, output_dtype: str, zero_point: Array | None = None, axis: int | None = None
) -> Array:
    """clip(round_half_even(input / scale) + zero_point) to the range of int8 or uint8."""
    levels = np.rint(input / along(scale, input, axis))
    if zero_point is not None:
        levels = levels + along(np.asarray(zero_point, np.float32), input, axis)
    limits = np.iinfo(output_dtype)
    return np.asarray(np.clip(levels, limits.min, limits.max))


def dequantize(input: Array, scale: Array, zero_point: Array | None = None, axis: int | None = None) -> Array:
    """scale * (input - zero_point)."""
    values = input.astype(np.float32)
    if zero_point is not None:
        values = values - along(np.asarray(zero_point, np.float32), input, axis)
    return values * along(scale, input, axis)


def _transposed(x: Array, wanted: bool) -> Array:
    return x.swapaxes(-1, -2) if wanted else x


def _padding(
    pad_type: str, pad: Array | None, size: tuple[int, ...], extent: tuple[int, ...], steps: tuple[int, ...]
) -> list[tuple[int, int]]:
    """(before, after) for each spatial axis; `same` puts an odd element after, `same_lower` before."""
    if pad_type == "valid":
        return [(0, 0)] * len(size)
    if pad_type == "custom":
        return [(0, 0)] * len(size) if pad is None else [(int(a), int(b)) for a, b in pad.reshape(-1, 2)]
    totals = (
        max((-(-length // step) - 1) * step + window - length, 0)
        for length, window, step in zip(size, extent, steps, strict=True)
    )
    pairs = [(total // 2, total - total // 2) for total in totals]
    return pairs if pad_type == "same" else [(after, before) for before, after in pairs]


NN_OPS: Mapping[str, Callable[..., Any]] = {
    "batch_norm": batch_norm,
    "conv": conv,
    "dequantize": dequantize,
    "einsum": einsum,
    "layer_norm": layer_norm,
    "linear": linear,
    "matmul": matmul,
    "quantize": quantize,
    "scaled_dot_product_attention": scaled_dot_product_attention,
    "softmax": softmax,
}
