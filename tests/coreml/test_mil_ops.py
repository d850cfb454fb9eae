"""Every kernel of the interpreter against PyTorch, on packages that coremltools wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from coremltools.converters.mil import Builder as mb

from vit_export.runtime.coreml_interpreter import Interpreter
from vit_export.runtime.mil_ops import KERNELS, erf

EXACT = {
    "convert_to": "mlprogram",
    "minimum_deployment_target": ct.target.iOS18,
    "compute_precision": ct.precision.FLOAT32,
    "skip_model_load": True,
}
T = torch.from_numpy
X = np.random.default_rng(0).standard_normal((2, 6, 8, 4)).astype(np.float32)
Y = np.random.default_rng(1).standard_normal((2, 6, 8, 4)).astype(np.float32)
W = np.random.default_rng(2).standard_normal((5, 4)).astype(np.float32)
K = np.random.default_rng(3).standard_normal((6, 3, 3, 3)).astype(np.float32)
V = np.random.default_rng(4).standard_normal(6).astype(np.float32)
POS = np.abs(V) + 0.5
I32 = np.array([[3, 0], [5, 5]], np.int32)


def slices(**named: Any) -> Callable[[Any, Any], Any]:
    return lambda x, y: mb.slice_by_index(x=x, **named)


# name: (MIL of x and y, reference of x and y as tensors)
CASES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "abs": (lambda x, y: mb.abs(x=x), lambda x, y: x.abs()),
    "add": (lambda x, y: mb.add(x=x, y=y), lambda x, y: x + y),
    "add_broadcast": (lambda x, y: mb.add(x=x, y=V.reshape(6, 1, 1)), lambda x, y: x + T(V)[:, None, None]),
    "batch_norm": (
        lambda x, y: mb.batch_norm(x=x, mean=V, variance=POS, gamma=POS, beta=V, epsilon=1e-3),
        lambda x, y: F.batch_norm(x, T(V), T(POS), T(POS), T(V), eps=1e-3),
    ),
    "batch_norm_plain": (
        lambda x, y: mb.batch_norm(x=x, mean=V, variance=POS),
        lambda x, y: F.batch_norm(x, T(V), T(POS)),
    ),
    "cast": (
        lambda x, y: mb.cast(x=mb.cast(x=mb.mul(x=x, y=3.0), dtype="int32"), dtype="fp32"),
        lambda x, y: (x * 3).trunc(),
    ),
    "clip": (lambda x, y: mb.clip(x=x, alpha=-0.5, beta=0.25), lambda x, y: x.clamp(-0.5, 0.25)),
    "concat": (lambda x, y: mb.concat(values=[x, y, x], axis=-2), lambda x, y: torch.cat([x, y, x], -2)),
    "concat_one": (lambda x, y: mb.concat(values=[x], axis=1), lambda x, y: x),
    "concat_interleave": (
        lambda x, y: mb.concat(values=[x, y], axis=1, interleave=True),
        lambda x, y: torch.stack([x, y], 2).flatten(1, 2),
    ),
    "conv_patch": (
        lambda x, y: mb.conv(x=x, weight=K.repeat(2, 1), strides=[3, 2], pad_type="valid", bias=V),
        lambda x, y: F.conv2d(x, T(K.repeat(2, 1)), T(V), stride=(3, 2)),
    ),
    "conv_grouped_padded": (
        lambda x, y: mb.conv(x=x, weight=K, groups=2, pad_type="custom", pad=[1, 2, 0, 1], strides=[2, 1]),
        lambda x, y: F.conv2d(F.pad(x, (0, 1, 1, 2)), T(K), stride=(2, 1), groups=2),
    ),
    "conv_depthwise_dilated": (
        lambda x, y: mb.conv(
            x=x, weight=K[:, :1], groups=6, pad_type="custom", pad=[2, 2, 2, 2], dilations=[2, 2]
        ),
        lambda x, y: F.conv2d(x, T(K[:, :1]), padding=2, dilation=2, groups=6),
    ),
    "conv_same": (
        lambda x, y: mb.conv(x=x, weight=K, groups=2, pad_type="same"),
        lambda x, y: F.conv2d(x, T(K), padding="same", groups=2),
    ),
    "conv_same_lower": (
        lambda x, y: mb.conv(x=x, weight=K[:, :, :2, :2], groups=2, pad_type="same_lower"),
        lambda x, y: F.conv2d(F.pad(x, (1, 0, 1, 0)), T(K[:, :, :2, :2]), groups=2),
    ),
    "cos": (lambda x, y: mb.cos(x=x), lambda x, y: x.cos()),
    "einsum": (
        lambda x, y: mb.einsum(values=[x, mb.transpose(x=y, perm=[0, 3, 2, 1])], equation="nchw,nwhu->nchu"),
        lambda x, y: torch.einsum("nchw,nwhu->nchu", x, y.permute(0, 3, 2, 1)),
    ),
    "erf": (lambda x, y: mb.erf(x=x), lambda x, y: torch.erf(x)),
    "fill": (lambda x, y: mb.fill(shape=[2, 3], value=0.5), lambda x, y: torch.full((2, 3), 0.5)),
    "exp": (lambda x, y: mb.exp(x=x), lambda x, y: x.exp()),
    "expand_dims": (
        lambda x, y: mb.expand_dims(x=mb.reduce_sum(x=x, axes=[0, 1]), axes=[1, -1]),
        lambda x, y: x.sum((0, 1)).unsqueeze(1).unsqueeze(-1),
    ),
    "floor_div": (lambda x, y: mb.floor_div(x=x, y=y), lambda x, y: torch.floor(x / y)),
    "gather": (lambda x, y: mb.gather(x=x, indices=I32, axis=1), lambda x, y: x[:, T(I32).long()]),
    "gather_batched": (
        lambda x, y: mb.gather(x=x, indices=I32, axis=1, batch_dims=1),
        lambda x, y: torch.stack([x[0, T(I32[0]).long()], x[1, T(I32[1]).long()]]),
    ),
    "gather_along_axis": (
        lambda x, y: mb.gather_along_axis(x=x, indices=np.argsort(X, 1).astype(np.int32), axis=1),
        lambda x, y: x.gather(1, T(np.argsort(X, 1))),
    ),
    "gelu": (lambda x, y: mb.gelu(x=x), lambda x, y: F.gelu(x)),
    "gelu_tanh": (
        lambda x, y: mb.gelu(x=x, mode="TANH_APPROXIMATION"),
        lambda x, y: F.gelu(x, approximate="tanh"),
    ),
    "gelu_sigmoid": (
        lambda x, y: mb.gelu(x=x, mode="SIGMOID_APPROXIMATION"),
        lambda x, y: x * torch.sigmoid(1.702 * x),
    ),
    "identity": (lambda x, y: mb.identity(x=x), lambda x, y: x),
    "inverse": (lambda x, y: mb.inverse(x=x, epsilon=1e-3), lambda x, y: 1 / (x + 1e-3)),
    "layer_norm": (
        lambda x, y: mb.layer_norm(x=x, axes=[-1], gamma=W[0], beta=W[1], epsilon=1e-6),
        lambda x, y: F.layer_norm(x, (4,), T(W[0]), T(W[1]), 1e-6),
    ),
    "layer_norm_two_axes": (
        lambda x, y: mb.layer_norm(x=x, axes=[2, 3], epsilon=1e-5),
        lambda x, y: F.layer_norm(x, (8, 4)),
    ),
    "linear": (
        lambda x, y: mb.linear(x=x, weight=W, bias=W[:, 0]),
        lambda x, y: F.linear(x, T(W), T(W[:, 0])),
    ),
    "log": (lambda x, y: mb.log(x=mb.abs(x=x), epsilon=1e-4), lambda x, y: (x.abs() + 1e-4).log()),
    "logical": (
        lambda x, y: mb.cast(
            x=mb.logical_or(
                x=mb.logical_and(x=mb.greater(x=x, y=y), y=mb.less_equal(x=x, y=1.0)),
                y=mb.logical_not(x=mb.greater_equal(x=x, y=-1.0)),
            ),
            dtype="fp32",
        ),
        lambda x, y: (((x > y) & (x <= 1)) | ~(x >= -1)).float(),
    ),
    "equalities": (
        lambda x, y: mb.add(
            x=mb.cast(x=mb.equal(x=x, y=mb.relu(x=x)), dtype="fp32"),
            y=mb.cast(x=mb.not_equal(x=x, y=mb.minimum(x=x, y=y)), dtype="fp32"),
        ),
        lambda x, y: (x == x.relu()).float() + (x != torch.minimum(x, y)).float(),
    ),
    "less": (
        lambda x, y: mb.cast(x=mb.less(x=x, y=y), dtype="fp32"),
        lambda x, y: (x < y).float(),
    ),
    "matmul": (lambda x, y: mb.matmul(x=x, y=y, transpose_y=True), lambda x, y: x @ y.mT),
    "matmul_transposed_x": (lambda x, y: mb.matmul(x=x, y=y, transpose_x=True), lambda x, y: x.mT @ y),
    "maximum": (lambda x, y: mb.maximum(x=x, y=y), lambda x, y: torch.maximum(x, y)),
    "mul": (lambda x, y: mb.mul(x=x, y=y), lambda x, y: x * y),
    "pad": (
        lambda x, y: mb.pad(x=x, pad=[1, 0, 2, 3], mode="constant", constant_val=0.5),
        lambda x, y: F.pad(x, (2, 3, 1, 0), value=0.5),
    ),
    "pad_reflect": (
        lambda x, y: mb.pad(x=x, pad=[1, 2, 3, 0], mode="reflect"),
        lambda x, y: F.pad(x, (3, 0, 1, 2), mode="reflect"),
    ),
    "pad_replicate": (
        lambda x, y: mb.pad(x=x, pad=[1, 2, 3, 0], mode="replicate"),
        lambda x, y: F.pad(x, (3, 0, 1, 2), mode="replicate"),
    ),
    "pow": (lambda x, y: mb.pow(x=mb.abs(x=x), y=2.5), lambda x, y: x.abs() ** 2.5),
    "quantize_uint8": (
        lambda x, y: mb.dequantize(
            input=mb.quantize(input=x, scale=np.float32(0.02), zero_point=np.uint8(77), output_dtype="uint8"),
            scale=np.float32(0.02),
            zero_point=np.uint8(77),
        ),
        lambda x, y: torch.fake_quantize_per_tensor_affine(x, 0.02, 77, 0, 255),
    ),
    "quantize_int8_axis": (
        lambda x, y: mb.dequantize(
            input=mb.quantize(input=x, scale=POS / 40, output_dtype="int8", axis=1), scale=POS / 40, axis=1
        ),
        lambda x, y: torch.fake_quantize_per_channel_affine(
            x, T(POS / 40), torch.zeros(6, dtype=torch.int32), 1, -128, 127
        ),
    ),
    "real_div": (lambda x, y: mb.real_div(x=x, y=y), lambda x, y: x / y),
    "reduce_l2_norm": (
        lambda x, y: mb.reduce_l2_norm(x=x, axes=[-1], keep_dims=True),
        lambda x, y: x.norm(dim=-1, keepdim=True),
    ),
    "reduce_max": (lambda x, y: mb.reduce_max(x=x, axes=[1, 2]), lambda x, y: x.amax((1, 2))),
    "reduce_mean": (
        lambda x, y: mb.reduce_mean(x=x, axes=[2, 3], keep_dims=False),
        lambda x, y: x.mean((2, 3)),
    ),
    "reduce_min": (lambda x, y: mb.reduce_min(x=x, axes=[-1], keep_dims=True), lambda x, y: x.amin(-1, True)),
    "reduce_sum": (lambda x, y: mb.reduce_sum(x=x, axes=[0]), lambda x, y: x.sum(0)),
    "reduce_sum_square": (lambda x, y: mb.reduce_sum_square(x=x, axes=[0]), lambda x, y: (x * x).sum(0)),
    "relu": (lambda x, y: mb.relu(x=x), lambda x, y: x.relu()),
    "reshape": (lambda x, y: mb.reshape(x=x, shape=[2, -1, 4]), lambda x, y: x.reshape(2, -1, 4)),
    "reshape_keep": (lambda x, y: mb.reshape(x=x, shape=[0, 0, 4, -1]), lambda x, y: x.reshape(2, 6, 4, 8)),
    "rsqrt": (
        lambda x, y: mb.rsqrt(x=mb.square(x=x), epsilon=1e-2),
        lambda x, y: (x.square() + 1e-2).rsqrt(),
    ),
    "attention": (
        lambda x, y: mb.scaled_dot_product_attention(query=x, key=y, value=mb.mul(x=y, y=x)),
        lambda x, y: F.scaled_dot_product_attention(x, y, x * y),
    ),
    "attention_mask": (
        lambda x, y: mb.scaled_dot_product_attention(query=x, key=y, value=x, attn_mask=MASK),
        lambda x, y: F.scaled_dot_product_attention(x, y, x, attn_mask=T(MASK)),
    ),
    "attention_bias": (
        lambda x, y: mb.scaled_dot_product_attention(query=x, key=y, value=x, attn_mask=BIAS),
        lambda x, y: F.scaled_dot_product_attention(x, y, x, attn_mask=T(BIAS)),
    ),
    "scatter_add": (
        lambda x, y: mb.scatter(
            data=x, indices=I32[1], updates=mb.gather(x=y, indices=I32[0], axis=1), axis=1
        ),
        lambda x, y: x.index_add(1, T(I32[1]), y[:, T(I32[0]).long()]),
    ),
    "scatter_update": (
        lambda x, y: mb.scatter(
            data=x, indices=I32[0], updates=mb.gather(x=y, indices=I32[0], axis=2), axis=2, mode="update"
        ),
        lambda x, y: x.index_copy(2, T(I32[0]).long(), y[:, :, T(I32[0]).long()]),
    ),
    "select": (
        lambda x, y: mb.select(cond=mb.greater(x=x, y=0.0), a=x, b=y),
        lambda x, y: torch.where(x > 0, x, y),
    ),
    "sigmoid": (lambda x, y: mb.sigmoid(x=mb.mul(x=x, y=60.0)), lambda x, y: (x * 60).sigmoid()),
    "silu": (lambda x, y: mb.silu(x=x), lambda x, y: F.silu(x)),
    "sin": (lambda x, y: mb.sin(x=x), lambda x, y: x.sin()),
    "slice": (
        slices(begin=[0, 1, -3, 0], end=[2, 6, -1, 4], stride=[1, 2, 1, 1]),
        lambda x, y: x[:, 1:6:2, -3:-1],
    ),
    "slice_backwards": (
        slices(
            begin=[0, 0, 7, 3],
            end=[0, 0, 2, 0],
            stride=[1, 1, -1, -1],
            begin_mask=[True, True, False, True],
            end_mask=[True, True, False, True],
        ),
        lambda x, y: x.flip(2)[:, :, :5].flip(3),
    ),
    "slice_squeeze": (
        slices(
            begin=[0, -2, 0, 1],
            end=[0, 0, 0, 0],
            begin_mask=[True, False, True, False],
            end_mask=[True, False, True, True],
            squeeze_mask=[False, True, False, False],
        ),
        lambda x, y: x[:, -2, :, 1:],
    ),
    "slice_by_size": (
        lambda x, y: mb.slice_by_size(x=x, begin=[0, 1, 2, 0], size=[1, 3, -1, 4]),
        lambda x, y: x[:1, 1:4, 2:],
    ),
    "softmax": (
        lambda x, y: mb.softmax(x=mb.mul(x=x, y=200.0), axis=1),
        lambda x, y: (x * 200).softmax(1),
    ),
    "split": (lambda x, y: mb.split(x=x, num_splits=3, axis=1)[1], lambda x, y: x.chunk(3, 1)[1]),
    "split_sizes": (
        lambda x, y: mb.split(x=x, split_sizes=[1, 2, 5], axis=2)[2],
        lambda x, y: x.split([1, 2, 5], 2)[2],
    ),
    "sqrt": (lambda x, y: mb.sqrt(x=mb.square(x=x)), lambda x, y: x.abs()),
    "squeeze": (
        lambda x, y: mb.squeeze(x=mb.reshape(x=x, shape=[1, 12, 1, 32]), axes=[0]),
        lambda x, y: x.reshape(12, 1, 32),
    ),
    "stack": (lambda x, y: mb.stack(values=[x, y], axis=2), lambda x, y: torch.stack([x, y], 2)),
    "sub": (lambda x, y: mb.sub(x=x, y=y), lambda x, y: x - y),
    "tanh": (lambda x, y: mb.tanh(x=x), lambda x, y: x.tanh()),
    "tile": (lambda x, y: mb.tile(x=x, reps=[1, 2, 1, 3]), lambda x, y: x.tile(1, 2, 1, 3)),
    "transpose": (
        lambda x, y: mb.transpose(x=x, perm=[-1, 0, 2, 1]),
        lambda x, y: x.permute(3, 0, 2, 1),
    ),
}
MASK = np.tril(np.ones((8, 8), bool))
BIAS = np.random.default_rng(5).standard_normal((6, 8, 8)).astype(np.float32)
ELSEWHERE = {name for name in KERNELS if name.startswith("constexpr_")} | {"classify"}


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Interpreter:
    """One package whose outputs are all cases, written without coremltools' optimisation passes."""
    specs = [mb.TensorSpec(X.shape), mb.TensorSpec(Y.shape)]

    @mb.program(input_specs=specs, opset_version=ct.target.iOS18)
    def everything(x: Any, y: Any) -> Any:
        return tuple(mb.identity(x=build(x, y), name=name) for name, (build, _) in CASES.items())

    model = ct.convert(everything, pass_pipeline=ct.PassPipeline.EMPTY, **EXACT)
    path = tmp_path_factory.mktemp("ops") / "all.mlpackage"
    model.save(str(path))
    return Interpreter(path)


@pytest.fixture(scope="module")
def results(interpreter: Interpreter) -> dict[str, Any]:
    return interpreter.predict({"x": X, "y": Y})


@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_pytorch(name: str, results: dict[str, Any]) -> None:
    """Each operation of a saved package gives PyTorch's numbers, over its parameters and corner cases."""
    expected = CASES[name][1](T(X), T(Y)).numpy()
    assert results[name].dtype == np.float32
    np.testing.assert_allclose(results[name], expected, rtol=2e-5, atol=2e-6)


def test_every_kernel_was_executed(interpreter: Interpreter) -> None:
    """No kernel is without a case: what the package ran is the whole table but what other tests run."""
    assert set(interpreter.operations) == set(KERNELS) - ELSEWHERE


def test_erf_is_accurate_and_odd() -> None:
    """The table's erf agrees with PyTorch's to 2e-7 everywhere, infinities included, and keeps the sign."""
    x = np.concatenate([np.linspace(-9, 9, 100_001), [np.inf, -np.inf, 0.0, 1e-30]]).astype(np.float32)
    np.testing.assert_allclose(erf(x), torch.erf(T(x)).numpy(), rtol=1e-6, atol=2e-8)
    np.testing.assert_array_equal(erf(-x), -erf(x))


def test_fp16_rounds_once_after_accumulating_in_float32(tmp_path: Path) -> None:
    """A product declared fp16 is the float32 product of the fp16 numbers, rounded; 4096 + 1 ones show it.

    Accumulated in fp16 the sum would stop at 2048, where 1 is half a unit in the last place.
    """

    @mb.program(input_specs=[mb.TensorSpec((1, 4097))], opset_version=ct.target.iOS18)
    def ones(x: Any) -> Any:
        return mb.linear(x=x, weight=np.ones((1, 4097), np.float32), name="sum")

    model = ct.convert(ones, **{**EXACT, "compute_precision": ct.precision.FLOAT16})
    model.save(str(tmp_path / "sum.mlpackage"))
    result = Interpreter(tmp_path / "sum.mlpackage").predict({"x": np.ones((1, 4097), np.float32)})["sum"]
    assert result == np.float16(4097.0) == 4096.0


def test_fp16_overflow_is_infinite(tmp_path: Path) -> None:
    """Beyond 65504 a value declared fp16 is inf, so that a model that overflows is seen to."""

    @mb.program(input_specs=[mb.TensorSpec((2,))], opset_version=ct.target.iOS18)
    def squares(x: Any) -> Any:
        return mb.square(x=x, name="square")

    model = ct.convert(squares, **{**EXACT, "compute_precision": ct.precision.FLOAT16})
    model.save(str(tmp_path / "square.mlpackage"))
    result = Interpreter(tmp_path / "square.mlpackage").predict({"x": np.array([255.0, 256.0], np.float32)})
    np.testing.assert_array_equal(result["square"], [np.float32(np.float16(65025)), np.inf])
