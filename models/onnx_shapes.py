"""ONNX operators that move, cut or index data; most also run on the host, where shapes are computed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vit_export.models.onnx_call import Call, Host, Value, as_tensor, host_shape

MAX_ELEMENTS = 1 << 26  # of what one node makes up
_RESIZE = {"nearest": "nearest", "linear": "bilinear", "cubic": "bicubic"}


def _identity(call: Call) -> Value:
    return call.host(0) if call.on_host else call.tensor()


def _shape(call: Call) -> Host:
    value = call.inputs[0]
    assert value is not None
    start, end = call.attribute("start", 0), call.attribute("end")
    return host_shape(list(value.shape)[start:end])


def _size(call: Call) -> Host:
    value = call.inputs[0]
    count: Any = 1
    for side in [] if value is None else value.shape:
        count = count * side
    return host_shape([count])[0:1].reshape(())


def _reshape(call: Call) -> Value:
    value, wanted = call.inputs[0], call.ints(1)
    assert value is not None
    if not call.attribute("allowzero", 0):
        wanted = [value.shape[i] if side == 0 else side for i, side in enumerate(wanted)]
    return value.reshape(wanted)


def _flatten(call: Call) -> Tensor:
    x, rows = call.tensor(), 1
    axis = call.attribute("axis", 1)
    for side in x.shape[: axis if axis >= 0 else axis + x.ndim]:
        rows = rows * side
    return x.reshape(rows, -1)


def _transpose(call: Call) -> Value:
    value = call.inputs[0]
    assert value is not None
    order = call.attribute("perm") or tuple(reversed(range(value.ndim)))
    return value.permute(*order) if isinstance(value, Tensor) else value.transpose(order)


def _unsqueeze(call: Call) -> Value:
    value, axes = call.inputs[0], call.axes() or []
    assert value is not None
    rank = value.ndim + len(axes)
    for axis in sorted(a % rank for a in axes):
        value = value.unsqueeze(axis) if isinstance(value, Tensor) else np.expand_dims(value, axis)
    return value


def _squeeze(call: Call) -> Value:
    value, axes = call.inputs[0], call.axes()
    assert value is not None
    if axes is None:
        axes = [i for i, side in enumerate(value.shape) if isinstance(side, int) and side == 1]
    for axis in sorted((a % value.ndim for a in axes), reverse=True):
        value = value.squeeze(axis)
    return value


def _concat(call: Call) -> Value:
    axis = call.attribute("axis")
    if call.on_host:
        return np.concatenate([call.host(i) for i in range(len(call.inputs))], axis)
    return torch.cat([call.tensor(i) for i in range(len(call.inputs))], axis)


def _split(call: Call) -> tuple[Value, ...]:
    axis = call.attribute("axis", 0)
    sizes = call.attribute("split") or (call.ints(1) if call.has(1) else None)
    if call.on_host:
        array = call.host(0)
        cuts: Any = np.cumsum(sizes)[:-1] if sizes else call.outputs
        return tuple(np.split(array, cuts, axis))
    x = call.tensor()
    return torch.split(x, sizes or -(-x.shape[axis] // call.outputs), axis)


def _slice(call: Call) -> Value:
    value = call.inputs[0]
    assert value is not None
    starts, ends = call.ints(1), call.ints(2)
    axes = call.ints(3) if call.has(3) else list(range(len(starts)))
    steps = call.ints(4) if call.has(4) else [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        value = _cut(value, axis % value.ndim, start, end, step)
    return value


def _cut(value: Value, axis: int, start: Any, end: Any, step: int) -> Value:
    if isinstance(value, Tensor) and step < 0:
        index = range(value.shape[axis])[_bounds(start, end, step)]
        return value.index_select(axis, torch.tensor(list(index)))
    cut = (slice(None),) * axis + (_bounds(start, end, step),)
    result: Value = value[cut]
    return result


def _bounds(start: Any, end: Any, step: int) -> slice:
    """ONNX writes `to the end` as a huge number, forwards or backwards."""
    huge = 2**31 - 1
    stop = None if isinstance(end, int) and (end >= huge or end <= -huge) else end
    begin = None if isinstance(start, int) and start >= huge else start
    return slice(begin, stop, step)


def _gather(call: Call) -> Value:
    axis = call.attribute("axis", 0)
    if call.on_host:
        return np.asarray(np.take(call.host(0), call.host(1).astype(np.int64), axis))
    x = call.tensor()
    index = call.inputs[1]
    if not isinstance(index, Tensor) and index is not None and index.size == 1:
        axis %= x.ndim
        row = x.select(axis, int(index.reshape(-1)[0]))
        return row if index.ndim == 0 else row.reshape([*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]])
    where = call.tensor(1).long()
    where = torch.where(where < 0, where + x.shape[axis], where)
    picked = x.index_select(axis, where.flatten())
    axis %= x.ndim
    return picked.reshape([*x.shape[:axis], *where.shape, *x.shape[axis + 1 :]])


def _expand(call: Call) -> Value:
    wanted = _bounded(call, call.ints(1))
    if call.on_host and not _symbolic(wanted):
        return np.broadcast_to(call.host(0), np.broadcast_shapes(call.host(0).shape, tuple(wanted)))
    x = call.tensor()
    while len(wanted) < x.ndim:
        wanted = [1, *wanted]
    sides = [1] * (len(wanted) - x.ndim) + list(x.shape)
    pairs = zip(sides, wanted, strict=True)
    return x.expand([have if isinstance(want, int) and want == 1 else want for have, want in pairs])


def _tile(call: Call) -> Value:
    repeats = call.ints(1)
    value = call.inputs[0]
    assert value is not None
    _bounded(call, [*repeats, *value.shape])
    here = call.on_host and not _symbolic(repeats)
    return np.tile(call.host(0), repeats) if here else call.tensor().repeat(repeats)


def _where(call: Call) -> Value:
    if call.on_host:
        return np.where(call.host(0).astype(np.bool_), call.host(1), call.host(2))
    _, yes, no = call.operands()
    return torch.where(call.tensor(0), yes, no)


def _constant_of_shape(call: Call) -> Value:
    value = call.attribute("value", np.zeros(1, np.float32))
    shape = _bounded(call, call.ints(0))
    if not _symbolic(shape):
        array = np.full(shape, value.reshape(-1)[0], value.dtype)
        return array if array.size <= 64 else as_tensor(array)
    return torch.full(shape, value.reshape(-1)[0].item(), dtype=as_tensor(value).dtype)


def _range(call: Call) -> Value:
    start, limit, step = (call.ints(i)[0] for i in range(3))
    if _symbolic([start, limit, step]):
        return torch.arange(start, limit, step)
    if step == 0:
        raise call.unsupported("a range with step 0")
    _bounded(call, [int((limit - start) / step)])
    values: Host = np.arange(start, limit, step, dtype=call.host(0).dtype)
    return values


def _bounded(call: Call, shape: list[Any]) -> list[Any]:
    """The shape, if a tensor of it is not absurd: a few bytes of a file could ask for any size."""
    known = [abs(int(side)) for side in shape if not _symbolic([side])]
    if math.prod(side for side in known if side) > MAX_ELEMENTS:
        raise call.unsupported(f"it makes a tensor of {known}")
    return shape


def _symbolic(values: list[Any]) -> bool:
    """Whether a value follows from a batch that torch.export keeps open."""
    return any(isinstance(value, torch.SymInt | torch.SymFloat) for value in values)


def _pad(call: Call) -> Tensor:
    x, pads = call.tensor(), call.ints(1)
    axes = [a % x.ndim for a in call.ints(3)] if call.has(3) else list(range(x.ndim))
    if call.attribute("mode", "constant") != "constant":
        raise call.unsupported(f"padding mode {call.attribute('mode')}")
    amounts = [0] * (2 * x.ndim)
    _bounded(call, [abs(side) + 1 for side in pads if not _symbolic([side])])
    for position, axis in enumerate(axes):
        amounts[2 * (x.ndim - 1 - axis)] = pads[position]
        amounts[2 * (x.ndim - 1 - axis) + 1] = pads[position + len(axes)]
    value = call.host(2).item() if call.has(2) and call.host(2).size else 0.0
    return functional.pad(x, amounts, value=value)


def _resize(call: Call) -> Tensor:
    """Images [N, C, H, W] to other sides, the ways PyTorch exports: cubic, linear or nearest."""
    x = call.tensor()
    mode, where = (
        _RESIZE.get(call.attribute("mode", "nearest"), ""),
        call.attribute("coordinate_transformation_mode", "half_pixel"),
    )
    usual = where in ("half_pixel", "pytorch_half_pixel") and not call.attribute("antialias", 0)
    cubic = mode != "bicubic" or abs(call.attribute("cubic_coeff_a", -0.75) + 0.75) < 1e-6
    nearest = where == "asymmetric" and call.attribute("nearest_mode", "round_prefer_floor") == "floor"
    if x.ndim != 4 or not mode or (call.has(1) and call.host(1).size) or "axes" in call.attributes:
        raise call.unsupported("resizing other than an image's height and width")
    if not cubic or not (nearest if mode == "nearest" else usual):
        raise call.unsupported(f"resizing by {mode} at {where} coordinates")
    corners = None if mode == "nearest" else False
    if call.has(3):
        _bounded(call, call.ints(3))
        return functional.interpolate(x, size=call.ints(3)[2:], mode=mode, align_corners=corners)
    _bounded(call, [math.ceil(abs(scale)) for scale in call.ints(2) if math.isfinite(scale)])
    return functional.interpolate(x, scale_factor=call.ints(2)[2:], mode=mode, align_corners=corners)


def _depth_to_space(call: Call) -> Tensor:
    x, block = call.tensor(), call.attribute("blocksize")
    if call.attribute("mode", "DCR") == "CRD":
        return functional.pixel_shuffle(x, block)
    n, c, h, w = x.shape
    x = x.reshape(n, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return x.reshape(n, c // block**2, h * block, w * block)


def _space_to_depth(call: Call) -> Tensor:
    x, block = call.tensor(), call.attribute("blocksize")
    n, c, h, w = x.shape
    x = x.reshape(n, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4)
    return x.reshape(n, c * block**2, h // block, w // block)


def _scatter_nd(call: Call) -> Tensor:
    data, index, updates = call.tensor(0), call.tensor(1).long(), call.tensor(2)
    if call.attribute("reduction", "none") != "none":
        raise call.unsupported("a reduction")
    return data.index_put(tuple(index.unbind(-1)), updates)


def _trilu(call: Call) -> Tensor:
    diagonal = call.ints(1)[0] if call.has(1) else 0
    return call.tensor().triu(diagonal) if call.attribute("upper", 1) else call.tensor().tril(diagonal)


def _gather_elements(call: Call) -> Tensor:
    return call.tensor(0).gather(call.attribute("axis", 0), call.tensor(1).long())


def _gather_nd(call: Call) -> Tensor:
    if call.attribute("batch_dims", 0):
        raise call.unsupported("batch dimensions")
    return call.tensor(0)[call.tensor(1).long().unbind(-1)]


def _cum_sum(call: Call) -> Tensor:
    if call.attribute("exclusive", 0) or call.attribute("reverse", 0):
        raise call.unsupported("exclusive or reverse")
    return call.tensor().cumsum(call.ints(1)[0])


SHAPES: Mapping[str, Any] = {
    "Identity": _identity,
    "Dropout": _identity,
    "Shape": _shape,
    "Size": _size,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Expand": _expand,
    "Tile": _tile,
    "Where": _where,
    "ConstantOfShape": _constant_of_shape,
    "Range": _range,
    "Pad": _pad,
    "Resize": _resize,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
    "ScatterND": _scatter_nd,
    "Trilu": _trilu,
    "CumSum": _cum_sum,
}
