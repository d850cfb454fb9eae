"""Compressed weights: what the interpreter reads from the file is what coremltools decompresses."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import coremltools as ct
import coremltools.optimize.coreml as cto
import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.frontend.milproto.load import load
from torch import nn

from vit_export.runtime.coreml_interpreter import Interpreter
from vit_export.runtime.mil_constexpr import affine_dequantize, lut_to_dense
from vit_export.runtime.mil_weights import unpack

SIZE = 16


@cache
def model(target: Any, precision: str) -> Any:
    """A convolution and two linears large enough for every compressor, as an MLModel."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 32, 4, 4), nn.Flatten(2), nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 48)
    ).eval()
    program = torch.export.export(net, (torch.zeros(1, 3, SIZE, SIZE),)).run_decompositions({})
    return ct.convert(
        program,
        minimum_deployment_target=target,
        compute_precision=getattr(ct.precision, precision),
        inputs=[ct.TensorType("image", (1, 3, SIZE, SIZE), dtype=np.float32)],
        outputs=[ct.TensorType("out", dtype=np.float32)],
        skip_model_load=True,
    )


def linear(**options: Any) -> Callable[[Any], Any]:
    config = cto.OptimizationConfig(cto.OpLinearQuantizerConfig(weight_threshold=0, **options))
    return lambda mlmodel: cto.linear_quantize_weights(mlmodel, config)


def palette(**options: Any) -> Callable[[Any], Any]:
    options = {"mode": "uniform", "weight_threshold": 0, **options}
    config = cto.OptimizationConfig(cto.OpPalettizerConfig(**options))
    return lambda mlmodel: cto.palettize_weights(mlmodel, config)


def prune(mlmodel: Any) -> Any:
    config = cto.OpMagnitudePrunerConfig(target_sparsity=0.6, weight_threshold=0)
    return cto.prune_weights(mlmodel, cto.OptimizationConfig(config))


COMPRESSORS = {  # name: (deployment target, float type, compressor, number of compressed weights)
    "int8 channel iOS17": ("iOS17", "FLOAT16", linear(), 3),
    "int8 channel iOS18": ("iOS18", "FLOAT16", linear(), 3),
    "int8 channel fp32": ("iOS18", "FLOAT32", linear(), 3),
    "uint8 asymmetric iOS17": ("iOS17", "FLOAT16", linear(mode="linear", dtype="uint8"), 3),
    "uint8 asymmetric iOS18": ("iOS18", "FLOAT16", linear(mode="linear", dtype="uint8"), 3),
    "int8 tensor": ("iOS18", "FLOAT16", linear(granularity="per_tensor"), 3),
    "int4 block": ("iOS18", "FLOAT16", linear(dtype="int4", granularity="per_block", block_size=8), 2),
    "uint4 block asymmetric": (
        "iOS18", "FLOAT32", linear(mode="linear", dtype="uint4", granularity="per_block", block_size=16), 2,
    ),
    "palette 1 bit": ("iOS18", "FLOAT16", palette(nbits=1), 3),
    "palette 2 bit": ("iOS18", "FLOAT16", palette(nbits=2), 3),
    "palette 3 bit": ("iOS18", "FLOAT16", palette(nbits=3), 3),
    "palette 4 bit": ("iOS18", "FLOAT16", palette(nbits=4), 3),
    "palette 4 bit iOS17": ("iOS17", "FLOAT16", palette(nbits=4), 3),
    "palette 6 bit": ("iOS18", "FLOAT16", palette(nbits=6), 3),
    "palette 6 bit iOS17": ("iOS17", "FLOAT32", palette(nbits=6), 3),
    "palette 8 bit": ("iOS18", "FLOAT32", palette(nbits=8), 3),
    "palette grouped": (
        "iOS18", "FLOAT16", palette(nbits=4, granularity="per_grouped_channel", group_size=8), 3,
    ),
    "palette vector": ("iOS18", "FLOAT16", palette(nbits=4, cluster_dim=4, mode="kmeans"), 3),
    "sparse iOS17": ("iOS17", "FLOAT16", prune, 3),
    "sparse iOS18": ("iOS18", "FLOAT16", prune, 3),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPRESSORS)
def test_equals_coremltools_decompression(name: str, save: Any) -> None:
    """Every compressed weight of the saved file has, bit for bit, the value coremltools gives it."""
    target, precision, compress, count = COMPRESSORS[name]
    path = save(compress(model(getattr(ct.target, target), precision)))
    ours = Interpreter(path).decompressed
    theirs = coremltools_values(path)
    assert len(theirs) == count
    assert ours.keys() == theirs.keys()
    for weight, expected in theirs.items():
        half = ours[weight].astype(expected.dtype)
        assert half.astype(ours[weight].dtype).tobytes() == ours[weight].tobytes(), "not a number of its type"
        np.testing.assert_array_equal(half, expected)


def coremltools_values(path: Path) -> dict[str, Any]:
    """Name → value of each constexpr operation, by coremltools' own reader and decompression."""
    spec = ct.models.utils.load_spec(str(path))
    weights = str(path / "Data/com.apple.CoreML/weights")
    program = load(spec, specification_version=spec.specificationVersion, file_weights_dir=weights)
    return {
        op.outputs[0].name: op.materialized_val_inference()
        for op in program.functions["main"].operations
        if op.op_type.startswith("constexpr_")
    }


def test_palette_whose_entries_are_quantised(save: Any) -> None:
    """Joint compression (int8 palette, then a scale) goes through two operations and is exact."""
    indices = np.random.default_rng(0).integers(0, 16, (8, 4)).astype(np.uint8)
    lut = np.arange(-8, 8, dtype=np.int8).reshape(1, 1, 16, 1)
    scale = np.linspace(0.1, 0.8, 8, dtype=np.float32).reshape(8, 1)
    from coremltools.converters.mil.mil import types

    packed = indices.astype(types.nptype_from_builtin(types.uint4))

    @mb.program(input_specs=[mb.TensorSpec((1, 4))], opset_version=ct.target.iOS18)
    def joint(x: Any) -> Any:
        codes = mb.constexpr_lut_to_dense(indices=packed, lut=lut)
        weight = mb.constexpr_blockwise_shift_scale(data=codes, scale=scale, name="weight")
        return mb.linear(x=x, weight=weight, name="y")

    decompressed = Interpreter(save(joint, pass_pipeline=ct.PassPipeline.EMPTY)).decompressed
    np.testing.assert_array_equal(decompressed["weight"], (indices.astype(np.float32) - 8) * scale)


def test_fp16_constant_cast_to_fp32(save: Any) -> None:
    """constexpr_cast keeps the fp16 numbers it stores."""
    weight = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float16)

    @mb.program(input_specs=[mb.TensorSpec((1, 4))], opset_version=ct.target.iOS18)
    def widened(x: Any) -> Any:
        wide = mb.constexpr_cast(source_val=weight, output_dtype="fp32", name="weight")
        return mb.linear(x=x, weight=wide, name="y")

    decompressed = Interpreter(save(widened, pass_pipeline=ct.PassPipeline.EMPTY)).decompressed
    np.testing.assert_array_equal(decompressed["weight"], weight.astype(np.float32))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6])
def test_unpack_reads_bits_from_the_least_significant(bits: int) -> None:
    """Packed elements, also those that straddle a byte, come back in order."""
    values = np.random.default_rng(bits).integers(0, 2**bits, 37)
    stream = sum(int(value) << (i * bits) for i, value in enumerate(values))
    data = np.frombuffer(stream.to_bytes(-(-37 * bits // 8), "little"), np.uint8)
    np.testing.assert_array_equal(unpack(data, f"UINT{bits}", 37), values)


def test_unpack_int4_is_twos_complement() -> None:
    """INT4 0x8 is -8, 0x7 is 7, 0xF is -1."""
    np.testing.assert_array_equal(unpack(np.array([0x78, 0xF0], np.uint8), "INT4", 4), [-8, 7, 0, -1])


def test_affine_scale_broadcasts_along_a_negative_axis() -> None:
    """axis=-1 means the last dimension, as for every other axis of MIL."""
    data = np.ones((2, 3), np.int8)
    np.testing.assert_array_equal(
        affine_dequantize(data, np.int8(0), np.array([1, 2, 3], np.float32), -1), [[1, 2, 3], [1, 2, 3]]
    )


def test_vector_palette_fills_along_its_axis() -> None:
    """The documented example of constexpr_lut_to_dense, case 2.1: centroids laid along axis 1."""
    indices = np.array([[[0, 0], [1, 0]], [[1, 1], [0, 0]]], np.uint8)
    lut = np.array([10, 11, 12, 20, 21, 22], np.int8).reshape(1, 1, 1, 2, 3)
    dense = lut_to_dense(indices, lut, vector_axis=1)
    assert dense.shape == (2, 6, 2)
    np.testing.assert_array_equal(dense[0], [[10, 10], [11, 11], [12, 12], [20, 10], [21, 11], [22, 12]])
