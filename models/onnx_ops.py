"""ONNX operators of vision transformers, opset 11 to 23, as torch: arithmetic, activations, layers."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vit_export.models.onnx_call import Call, Value
from vit_export.models.onnx_shapes import SHAPES

Op: TypeAlias = Callable[[Call], Value | tuple[Value, ...]]

# ONNX element types → (torch, numpy). Half and double are computed in float32.
_F32 = (torch.float32, np.float32)
TYPES: Mapping[int, tuple[torch.dtype, type]] = {
    1: _F32, 10: _F32, 11: _F32, 16: _F32,
    2: (torch.uint8, np.uint8), 3: (torch.int8, np.int8), 5: (torch.int16, np.int16),
    6: (torch.int32, np.int32), 7: (torch.int64, np.int64), 9: (torch.bool, np.bool_),
}  # fmt: skip


def _unary(on_tensor: Callable[[Tensor], Tensor], on_host: Callable[[Any], Any] | None = None) -> Op:
    def run(call: Call) -> Value:
        if call.on_host and on_host is not None:
            result: Value = np.asarray(on_host(call.host(0)))
            return result
        return on_tensor(call.tensor())

    return run


def _binary(function: Callable[[Any, Any], Any]) -> Op:
    def run(call: Call) -> Value:
        left, right = call.operands()
        result = function(left, right)
        return np.asarray(result) if call.on_host else result

    return run


def _many(on_tensor: Callable[[Tensor, Tensor], Tensor], on_host: Callable[[Any, Any], Any]) -> Op:
    """Min, Max, Sum over any number of inputs."""

    def run(call: Call) -> Value:
        function = on_host if call.on_host else on_tensor
        values: list[Any] = [
            call.host(i) if call.on_host else call.tensor(i) for i in range(len(call.inputs))
        ]
        result = values[0]
        for value in values[1:]:
            result = function(result, value)
        return np.asarray(result) if call.on_host else result

    return run


def _divide(left: Any, right: Any) -> Any:
    """Integer division truncates (sizes are positive), float division does not."""
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        whole = isinstance(left, Tensor) and not left.is_floating_point()
        return torch.div(left, right, rounding_mode="trunc") if whole else left / right
    whole = left.dtype == object or np.issubdtype(left.dtype, np.integer)
    return left // right if whole else left / right


def _cast(call: Call) -> Value:
    on_tensor, on_host = TYPES.get(call.attribute("to"), (None, None))
    if on_tensor is None or on_host is None:
        raise call.unsupported(f"element type {call.attribute('to')}")
    if not call.on_host:
        return call.tensor().to(on_tensor)
    value = call.host(0)
    keep = value.dtype == object and np.issubdtype(on_host, np.integer)  # a symbolic size stays one
    return value if keep else value.astype(on_host)


def _softmax(call: Call) -> Tensor:
    x, old = call.tensor(), call.opset < 13
    axis = call.attribute("axis", 1 if old else -1)
    function = functional.log_softmax if call.label.startswith("LogSoftmax") else functional.softmax
    if not old or axis in (-1, x.ndim - 1):
        return function(x, dim=axis)
    return function(x.flatten(axis), dim=-1).reshape(x.shape)  # before opset 13: over all axes from `axis`


def _gelu(call: Call) -> Tensor:
    return functional.gelu(call.tensor(), approximate=call.attribute("approximate", "none"))


def _reduce(function: Callable[[Tensor, list[int], bool], Tensor]) -> Op:
    def run(call: Call) -> Value:
        x, axes = call.tensor(), call.axes()
        if axes is None and call.attribute("noop_with_empty_axes", 0):
            return x
        every = list(range(x.ndim))
        result = function(x, axes or every, bool(call.attribute("keepdims", 1)))
        return result.numpy() if call.on_host else result

    return run


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((a % x.ndim for a in axes), reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


def _clip(call: Call) -> Tensor:
    low = call.attribute("min") if not call.has(1) else call.host(1).item()
    high = call.attribute("max") if not call.has(2) else call.host(2).item()
    return call.tensor().clamp(low, high)


def _layer_norm(call: Call) -> Tensor:
    x = call.tensor()
    shape = x.shape[call.attribute("axis", -1) % x.ndim :]
    bias = call.tensor(2) if call.has(2) else None
    return functional.layer_norm(x, shape, call.tensor(1), bias, call.attribute("epsilon", 1e-5))


def _rms_norm(call: Call) -> Tensor:
    x = call.tensor()
    shape = x.shape[call.attribute("axis", -1) % x.ndim :]
    return functional.rms_norm(x, shape, call.tensor(1), call.attribute("epsilon", 1e-5))


def _batch_norm(call: Call) -> Tensor:
    x, scale, bias, mean, var = (call.tensor(i) for i in range(5))
    return functional.batch_norm(x, mean, var, scale, bias, eps=call.attribute("epsilon", 1e-5))


def _group_norm(call: Call) -> Tensor:
    x, scale, bias = (call.tensor(i) for i in range(3))
    groups = call.attribute("num_groups")
    if call.opset < 21:  # one scale a group
        scale, bias = (t.repeat_interleave(x.shape[1] // groups) for t in (scale, bias))
    return functional.group_norm(x, groups, scale, bias, call.attribute("epsilon", 1e-5))


def _instance_norm(call: Call) -> Tensor:
    x, scale, bias = (call.tensor(i) for i in range(3))
    return functional.instance_norm(x, weight=scale, bias=bias, eps=call.attribute("epsilon", 1e-5))


def _gemm(call: Call) -> Tensor:
    a, b = call.tensor(0), call.tensor(1)
    a = a.T if call.attribute("transA", 0) else a
    b = b.T if call.attribute("transB", 0) else b
    result: Tensor = call.attribute("alpha", 1.0) * (a @ b)
    return result + call.attribute("beta", 1.0) * call.tensor(2) if call.has(2) else result


def _pool(call: Call, function: Callable[..., Tensor], **extra: Any) -> Tensor:
    x, kernel = call.tensor(), call.attribute("kernel_shape")
    pads = call.attribute("pads", [0] * 2 * len(kernel))
    half = len(kernel)
    symmetric = list(pads[:half]) == list(pads[half:])
    dilated = any(d != 1 for d in call.attribute("dilations", [1] * half))
    if half != 2 or not symmetric or dilated or call.attribute("auto_pad", "NOTSET") != "NOTSET":
        raise call.unsupported("pooling with these pads or dimensions")
    strides = call.attribute("strides", [1] * half)
    ceil = bool(call.attribute("ceil_mode", 0))
    return function(x, kernel, strides, list(pads[:half]), ceil_mode=ceil, **extra)


def _average_pool(call: Call) -> Tensor:
    return _pool(call, functional.avg_pool2d, count_include_pad=bool(call.attribute("count_include_pad", 0)))


def _attention(call: Call) -> Tensor:
    """Attention of opset 23: [B, heads, T, D], or [B, T, heads * D] with head counts as attributes."""
    q, k, v = (call.tensor(i) for i in range(3))
    unusual = any(call.has(i) for i in (4, 5)) or call.outputs > 1 or call.attribute("softcap", 0.0)
    if unusual:
        raise call.unsupported("a key-value cache, softcap or several outputs")
    flat = q.ndim == 3
    if flat:
        heads, kv = call.attribute("q_num_heads"), call.attribute("kv_num_heads")
        q, k, v = (t.reshape(*t.shape[:2], n, -1).transpose(1, 2) for t, n in ((q, heads), (k, kv), (v, kv)))
    mask = call.tensor(3) if call.has(3) else None
    out = functional.scaled_dot_product_attention(
        q, k, v, mask,
        is_causal=bool(call.attribute("is_causal", 0)),
        scale=call.attribute("scale"),
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return out.transpose(1, 2).flatten(2) if flat else out


def _hard_sigmoid(call: Call) -> Tensor:
    line: Tensor = call.attribute("alpha", 0.2) * call.tensor() + call.attribute("beta", 0.5)
    return line.clamp(0, 1)


def _l2(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, 2, axes, keepdim=keep)
    return norm


_ARITHMETIC: Mapping[str, Op] = {
    "Add": _binary(operator.add),
    "Sub": _binary(operator.sub),
    "Mul": _binary(operator.mul),
    "Div": _binary(_divide),
    "Pow": _binary(operator.pow),
    "Mod": _binary(operator.mod),
    "Equal": _binary(operator.eq),
    "Greater": _binary(operator.gt),
    "GreaterOrEqual": _binary(operator.ge),
    "Less": _binary(operator.lt),
    "LessOrEqual": _binary(operator.le),
    "And": _binary(operator.and_),
    "Or": _binary(operator.or_),
    "Not": _unary(torch.logical_not, np.logical_not),
    "Neg": _unary(torch.neg, operator.neg),
    "Abs": _unary(torch.abs, np.abs),
    "Sqrt": _unary(torch.sqrt, np.sqrt),
    "Floor": _unary(torch.floor, np.floor),
    "Ceil": _unary(torch.ceil, np.ceil),
    "Round": _unary(torch.round, np.round),
    "Reciprocal": _unary(torch.reciprocal, lambda x: 1 / x),
    "Exp": _unary(torch.exp),
    "Log": _unary(torch.log),
    "Erf": _unary(torch.erf),
    "Sin": _unary(torch.sin),
    "Cos": _unary(torch.cos),
    "Sign": _unary(torch.sign),
    "IsNaN": _unary(torch.isnan),
    "Min": _many(torch.minimum, np.minimum),
    "Max": _many(torch.maximum, np.maximum),
    "Sum": _many(operator.add, operator.add),
    "Cast": _cast,
    "ReduceMean": _reduce(lambda x, axes, keep: x.mean(axes, keep)),
    "ReduceSum": _reduce(lambda x, axes, keep: x.sum(axes, keep)),
    "ReduceMax": _reduce(lambda x, axes, keep: x.amax(axes, keep)),
    "ReduceMin": _reduce(lambda x, axes, keep: x.amin(axes, keep)),
    "ReduceProd": _reduce(_product),
    "ReduceL2": _reduce(_l2),
}
_NEURAL: Mapping[str, Op] = {
    "Relu": _unary(torch.relu),
    "LeakyRelu": lambda call: functional.leaky_relu(call.tensor(), call.attribute("alpha", 0.01)),
    "Elu": lambda call: functional.elu(call.tensor(), call.attribute("alpha", 1.0)),
    "Sigmoid": _unary(torch.sigmoid),
    "Tanh": _unary(torch.tanh),
    "Softplus": _unary(functional.softplus),
    "HardSwish": _unary(functional.hardswish),
    "HardSigmoid": _hard_sigmoid,
    "Gelu": _gelu,
    "Softmax": _softmax,
    "LogSoftmax": _softmax,
    "Clip": _clip,
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _rms_norm,
    "BatchNormalization": _batch_norm,
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _instance_norm,
    "MatMul": lambda call: call.tensor(0) @ call.tensor(1),
    "Gemm": _gemm,
    "Einsum": lambda call: torch.einsum(
        call.attribute("equation"), *(call.tensor(i) for i in range(len(call.inputs)))
    ),
    "Attention": _attention,
    "AveragePool": _average_pool,
    "MaxPool": lambda call: _pool(call, functional.max_pool2d),
    "GlobalAveragePool": lambda call: call.tensor().mean(tuple(range(2, call.tensor().ndim)), keepdim=True),
}

OPS: Mapping[str, Op] = {**_ARITHMETIC, **_NEURAL, **SHAPES}
