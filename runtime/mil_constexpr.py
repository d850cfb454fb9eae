"""Compressed constants of MIL (`constexpr_*`), decompressed as the operator set defines it.

Before iOS 18 the operations carry packed bytes and an explicit shape; since iOS 18 the tensors have
sub-byte types and arrive here already unpacked. Definitions: coremltools' MIL operator reference, iOS 16
and iOS 18 `constexpr` operations. Values of type fp16 arrive, and leave, as float32 arrays; the
interpreter rounds the result to the declared type.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vit_export.runtime.mil_weights import Array, unpack


def affine_dequantize(quantized_data: Array, zero_point: Array, scale: Array, axis: int) -> Array:
    """scale * (data - zero_point), scale and zero_point scalars or one a slice along `axis`."""
    return along(scale, quantized_data, axis) * (
        quantized_data.astype(np.float32) - along(zero_point, quantized_data, axis)
    )


def blockwise_shift_scale(data: Array, scale: Array, offset: Array | None = None) -> Array:
    """scale * (data - offset), each scale for a block of data.shape / scale.shape elements."""
    shifted = data.astype(np.float32)
    if offset is not None:
        shifted = shifted - _spread(offset, data.shape).astype(np.float32)
    return _spread(scale, data.shape) * shifted


def lut_to_dense(
    indices: Array, lut: Array, shape: Array | None = None, vector_axis: int | None = None
) -> Array:
    """Palette entries by index.

    With `shape` (iOS 16): uint8 bytes of packed indices and one palette [2^bits]. Without (iOS 18):
    indices of any rank K and palettes [blocks of each dimension..., 2^bits, vector]; with a vector
    longer than 1 each index yields that many neighbours along `vector_axis`.
    """
    if shape is not None:
        bits = int(math.log2(lut.size))
        flat = unpack(indices, f"UINT{bits}", int(np.prod(shape, dtype=np.int64)))
        return np.asarray(lut[flat].reshape(tuple(shape)))
    blocks = np.ix_(*(np.arange(n) * b // n for n, b in zip(indices.shape, lut.shape[:-2], strict=True)))
    place = (*blocks, indices)
    entries = lut[place]  # [*indices.shape, vector]
    if vector_axis is None or lut.shape[-1] == 1:
        return np.asarray(entries[..., 0])
    axis = int(vector_axis) % indices.ndim
    merged = [n * lut.shape[-1] if i == axis else n for i, n in enumerate(indices.shape)]
    return np.asarray(np.moveaxis(entries, -1, axis + 1).reshape(merged))


def sparse_to_dense(nonzero_data: Array, mask: Array, shape: Array | None = None) -> Array:
    """Zeros with `nonzero_data` where `mask` is set; with `shape` (iOS 16) the mask is packed bits."""
    if shape is not None:
        mask = unpack(mask, "UINT1", int(np.prod(shape, dtype=np.int64))).reshape(tuple(shape))
    dense = np.zeros(mask.shape, nonzero_data.dtype)
    dense[mask != 0] = nonzero_data
    return dense


def cast(source_val: Array, output_dtype: str) -> Array:
    """The same values in another type (fp16 to fp32 is the only one defined)."""
    return source_val


def along(values: Array, data: Array, axis: int | None) -> Array:
    """A scalar, or a vector shaped to broadcast along `axis` of `data`."""
    if np.ndim(values) == 0 or axis is None:
        return values
    shape = [1] * data.ndim
    shape[int(axis)] = -1
    return np.asarray(values).reshape(shape)


def _spread(blocks: Array, shape: tuple[int, ...]) -> Array:
    """Repeat one value a block until `blocks` broadcasts to `shape`."""
    for axis, (size, count) in enumerate(zip(shape, blocks.shape, strict=True)):
        if 1 < count < size:
            blocks = np.repeat(blocks, size // count, axis)
    return blocks


CONSTEXPR: Mapping[str, Callable[..., Any]] = {
    "constexpr_affine_dequantize": affine_dequantize,
    "constexpr_blockwise_shift_scale": blockwise_shift_scale,
    "constexpr_cast": cast,
    "constexpr_lut_to_dense": lut_to_dense,
    "constexpr_sparse_to_dense": sparse_to_dense,
}
