"""MIL operations on shapes and places. Those in `SHAPE_OPS` only move elements: nothing to round.

Parameter names and defaults are those of the MIL operator reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vit_export.errors import UnsupportedOperator
from vit_export.runtime.mil_weights import Array


def reshape(x: Array, shape: Array) -> Array:
    """-1 is inferred, 0 keeps the dimension of x."""
    return x.reshape([x.shape[i] if size == 0 else int(size) for i, size in enumerate(shape)])


def expand_dims(x: Array, axes: Array) -> Array:
    """Insert dimensions of size 1 so that they stand at `axes` of the result."""
    return np.expand_dims(x, tuple(int(axis) for axis in axes))


def squeeze(x: Array, axes: Array | None = None) -> Array:
    """Remove dimensions of size 1 (default all)."""
    return np.squeeze(x, None if axes is None else tuple(int(axis) for axis in axes))


def concat(values: tuple[Array, ...], axis: int, interleave: bool = False) -> Array:
    """Join along `axis`; interleaved, one slice of each in turn."""
    if not interleave:
        return np.concatenate(values, axis)
    at = int(axis) % values[0].ndim
    shape = list(values[0].shape)
    shape[at] *= len(values)
    return np.stack(values, at + 1).reshape(shape)


def split(
    x: Array, axis: int, num_splits: int | None = None, split_sizes: Array | None = None
) -> tuple[Array, ...]:
    """Cut along `axis` into equal parts or parts of the given sizes."""
    if split_sizes is None:
        return tuple(np.split(x, int(num_splits or 1), axis))
    return tuple(np.split(x, np.cumsum(split_sizes)[:-1], axis))


def slice_by_index(
    x: Array,
    begin: Array,
    end: Array,
    stride: Array | None = None,
    begin_mask: Array | None = None,
    end_mask: Array | None = None,
    squeeze_mask: Array | None = None,
) -> Array:
    """x[begin:end:stride] with Python's rules; a masked begin or end is open, a squeezed axis is indexed."""

    def masked(mask: Array | None, axis: int) -> bool:
        return mask is not None and bool(mask[axis])

    index: list[int | slice] = []
    for axis in range(x.ndim):
        first = None if masked(begin_mask, axis) else int(begin[axis])
        last = None if masked(end_mask, axis) else int(end[axis])
        step = 1 if stride is None else int(stride[axis])
        index.append(first or 0 if masked(squeeze_mask, axis) else slice(first, last, step))
    return np.asarray(x[tuple(index)])


def slice_by_size(x: Array, begin: Array, size: Array) -> Array:
    """x[begin : begin + size]; size -1 reaches to the end."""
    return x[
        tuple(
            slice(int(first), None if count == -1 else int(first + count))
            for first, count in zip(begin, size, strict=True)
        )
    ]


def pad(x: Array, pad: Array, mode: str = "constant", constant_val: float = 0.0) -> Array:
    """Pad the last len(pad) / 2 dimensions by (before, after)."""
    pairs = [(int(a), int(b)) for a, b in np.reshape(pad, (-1, 2))]
    pairs = [(0, 0)] * (x.ndim - len(pairs)) + pairs
    if mode == "constant":
        return np.pad(x, pairs, constant_values=constant_val)
    return np.pad(x, pairs, mode="edge" if mode == "replicate" else "reflect")


def gather(
    x: Array, indices: Array, axis: int = 0, batch_dims: int = 0, validate_indices: bool = False
) -> Array:
    """Slices of x along `axis`; the first `batch_dims` dimensions of x and indices go together."""
    if not batch_dims:
        return np.asarray(np.take(x, indices, axis))
    parts = [
        gather(part, rows, int(axis) - 1, int(batch_dims) - 1) for part, rows in zip(x, indices, strict=True)
    ]
    return np.stack(parts)


def gather_along_axis(x: Array, indices: Array, axis: int = 0, validate_indices: bool = False) -> Array:
    """numpy's take_along_axis."""
    return np.take_along_axis(x, indices, axis)


def scatter(
    data: Array,
    indices: Array,
    updates: Array,
    axis: int = 0,
    mode: str = "add",
    validate_indices: bool = False,
) -> Array:
    """data with its slices at `indices` along `axis` replaced by, or (default) increased by, `updates`."""
    if mode not in ("add", "update"):
        raise UnsupportedOperator(f"the Core ML reference interpreter has no scatter that does {mode}")
    result: Array = data.copy()
    place = int(axis) % data.ndim
    slices = np.moveaxis(result, place, 0)  # a view: writing to it writes to result
    new = np.moveaxis(updates, range(place, place + np.ndim(indices)), range(np.ndim(indices)))
    if mode == "add":
        np.add.at(slices, indices, new)
    else:
        slices[indices] = new
    return result


SHAPE_OPS: Mapping[str, Callable[..., Any]] = {
    "concat": concat,
    "expand_dims": expand_dims,
    "gather": gather,
    "gather_along_axis": gather_along_axis,
    "identity": lambda x: x,
    "pad": pad,
    "reshape": reshape,
    "select": lambda cond, a, b: np.where(cond, a, b),
    "slice_by_index": slice_by_index,
    "slice_by_size": slice_by_size,
    "split": split,
    "squeeze": squeeze,
    "stack": lambda values, axis: np.stack(values, axis),
    "tile": lambda x, reps: np.tile(x, tuple(reps)),
    "transpose": lambda x, perm: np.transpose(x, perm),
}
