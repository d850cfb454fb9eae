"""MIL operations on single elements, reductions and classes, and `KERNELS`, the table of all that run.

A kernel is a plain numpy function whose parameters carry the names and defaults of the MIL operator
reference; `KERNELS` maps operation types to them. Values of type fp16 are float32 arrays that hold fp16
numbers, and the interpreter casts every result to the declared type, so kernels need not care.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np

from vit_export.runtime.mil_constexpr import CONSTEXPR
from vit_export.runtime.mil_nn_ops import NN_OPS
from vit_export.runtime.mil_shape_ops import SHAPE_OPS, scatter
from vit_export.runtime.mil_weights import Array

_ERF_STEPS = 4096  # table entries per unit: linear interpolation is then exact to 1e-8
_ERF_END = 6  # erf is 1 to float32 from 3.92 on


@cache
def _erf_table() -> tuple[Array, Array]:
    """erf at multiples of 1/_ERF_STEPS from 0 to _ERF_END, and the slope to the next entry."""
    values = np.array([math.erf(i / _ERF_STEPS) for i in range(_ERF_END * _ERF_STEPS + 1)])
    return values.astype(np.float32), np.append(np.diff(values), 0.0).astype(np.float32)


def erf(x: Array) -> Array:
    """Error function to 1e-7 in float32 (numpy has none), odd by construction."""
    values, slopes = _erf_table()
    position = np.minimum(np.abs(x) * np.float32(_ERF_STEPS), np.float32(_ERF_END * _ERF_STEPS))
    index = position.astype(np.int32)
    found: Array = np.copysign(values[index] + slopes[index] * (position - index), x)
    return found


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), written with tanh so that it never overflows."""
    return 0.5 + 0.5 * np.tanh(0.5 * x)


def gelu(x: Array, mode: str = "EXACT") -> Array:
    """Gaussian error linear unit in the three forms of MIL."""
    if mode == "TANH_APPROXIMATION":
        return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
    if mode == "SIGMOID_APPROXIMATION":
        return x * sigmoid(1.702 * x)
    return 0.5 * x * (1.0 + erf(x * np.float32(math.sqrt(0.5))))


def cast(x: Array, dtype: str) -> Array:
    """Values unchanged; the declared output type does the cast (floats truncate towards zero)."""
    return x


def classify(probabilities: Array, classes: list[Any]) -> tuple[Any, dict[Any, float]]:
    """The label of the largest probability, and each label's probability."""
    labels = [label if isinstance(label, str) else int(label) for label in classes]
    scores = np.ravel(probabilities)
    return labels[int(scores.argmax())], dict(zip(labels, map(float, scores), strict=True))


def _over_axes(reduce: Callable[..., Any]) -> Callable[..., Array]:
    """A MIL reduction from a numpy one."""

    def kernel(x: Array, axes: Array | None = None, keep_dims: bool = False) -> Array:
        over = None if axes is None else tuple(int(axis) for axis in axes)
        return np.asarray(reduce(x, axis=over, keepdims=bool(keep_dims)))

    return kernel


def _binary(function: Callable[..., Any]) -> Callable[..., Array]:
    """A MIL operation of x and y from a numpy function of two arguments."""
    return lambda x, y: np.asarray(function(x, y))


KERNELS: Mapping[str, Callable[..., Any]] = {
    **CONSTEXPR,
    **NN_OPS,
    **SHAPE_OPS,
    "abs": lambda x: np.abs(x),
    "add": _binary(np.add),
    "cast": cast,
    "classify": classify,
    "clip": lambda x, alpha, beta: np.clip(x, alpha, beta),
    "cos": lambda x: np.cos(x),
    "equal": _binary(np.equal),
    "erf": erf,
    "exp": lambda x: np.exp(x),
    "fill": lambda shape, value=0.0: np.full(tuple(shape), value),
    "floor_div": _binary(np.floor_divide),
    "gelu": gelu,
    "greater": _binary(np.greater),
    "greater_equal": _binary(np.greater_equal),
    "inverse": lambda x, epsilon=1e-4: 1.0 / (x + epsilon),
    "less": _binary(np.less),
    "less_equal": _binary(np.less_equal),
    "log": lambda x, epsilon=1e-45: np.log(x + epsilon),
    "logical_and": _binary(np.logical_and),
    "logical_not": lambda x: np.logical_not(x),
    "logical_or": _binary(np.logical_or),
    "maximum": _binary(np.maximum),
    "minimum": _binary(np.minimum),
    "mul": _binary(np.multiply),
    "not_equal": _binary(np.not_equal),
    "pow": _binary(np.power),
    "real_div": _binary(np.true_divide),
    "reduce_l2_norm": _over_axes(lambda x, **over: np.sqrt(np.sum(np.square(x), **over))),
    "reduce_max": _over_axes(np.max),
    "reduce_mean": _over_axes(np.mean),
    "reduce_min": _over_axes(np.min),
    "reduce_sum": _over_axes(np.sum),
    "reduce_sum_square": _over_axes(lambda x, **over: np.sum(np.square(x), **over)),
    "relu": lambda x: np.maximum(x, 0),
    "rsqrt": lambda x, epsilon=1e-12: 1.0 / np.sqrt(x + np.float32(epsilon)),
    "scatter": scatter,
    "sigmoid": sigmoid,
    "silu": lambda x: x * sigmoid(x),
    "sin": lambda x: np.sin(x),
    "sqrt": lambda x: np.sqrt(x),
    "square": lambda x: np.square(x),
    "sub": _binary(np.subtract),
    "tanh": lambda x: np.tanh(x),
}
