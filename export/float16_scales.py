"""Quantisation scales that float16 can hold, with the stored integers adjusted to them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

_NORMAL = 2.0**-14  # below it float16 keeps fewer than 11 bits
_STEP = 2.0**-24


def round_scales(model: ir.Model) -> None:
    """Make every float32 scale of Q/DQ a float16 value (still stored as float32), in place.

    A runtime wants one type for both scales of an integer product, so no scale may be left behind. A
    scale below 2^-14 is rounded up to float16's grid there and the constant it scales is quantised
    anew: its values move by at most half a step of the new scale, never by a common factor.
    """
    done: dict[tuple[str | None, str | None], tuple[ir.Value, ir.Value]] = {}
    for node in list(model.graph):
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        stored, scale = node.inputs[:2]
        if stored is None or scale is None or scale.const_value is None:
            continue
        if scale.const_value.dtype != ir.DataType.FLOAT:
            continue
        key = (stored.name if stored.const_value is not None else None, scale.name)
        if key not in done:
            done[key] = _rounded(model.graph, stored, scale, node.attributes.get_int("axis", 1))
        node.replace_input_with(0, done[key][0] if key[0] is not None else stored)
        node.replace_input_with(1, done[key][1])


def half_scale(scale: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The float16 value used for a positive scale: the nearest, or in its coarse range the next above."""
    up = np.ceil(scale.astype(np.float64) / _STEP) * _STEP
    nearest = scale.astype(np.float16).astype(np.float64)
    return np.where(scale < _NORMAL, np.maximum(up, _STEP), nearest).astype(np.float32)


def requantize(
    codes: npt.NDArray[np.int8], old: npt.NDArray[np.float32], new: npt.NDArray[np.float32], axis: int
) -> npt.NDArray[np.int8]:
    """codes * old / new, rounded: the same real values on another scale (per tensor or along `axis`)."""
    ratio = old.astype(np.float64) / new.astype(np.float64)
    if ratio.ndim == 1 and ratio.size > 1:
        ratio = ratio.reshape([-1 if i == axis % codes.ndim else 1 for i in range(codes.ndim)])
    limits = np.iinfo(codes.dtype)
    return np.clip(np.rint(codes * ratio), limits.min, limits.max).astype(codes.dtype)


def _rounded(graph: ir.Graph, stored: ir.Value, scale: ir.Value, axis: int) -> tuple[ir.Value, ir.Value]:
    """(stored, scale) with a float16-valued scale; `stored` is new only if its integers changed."""
    assert scale.const_value is not None
    old = scale.const_value.numpy()
    new = half_scale(old)
    constant = stored.const_value if stored.producer() is None else None
    if constant is not None and constant.dtype == ir.DataType.INT8:
        codes = constant.numpy()
        adjusted = requantize(codes, old, new, axis)
        if not np.array_equal(codes, adjusted):
            stored = _initializer(graph, f"{stored.name}.requantized", adjusted)
    return stored, _initializer(graph, f"{scale.name}.rounded", new)


def _initializer(graph: ir.Graph, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
    value = ir.val(name, const_value=ir.tensor(array, name=name))
    graph.register_initializer(value)
    return value
