"""Attention written out: tidied without changing numbers, and int8 only where that pays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from vit_export.artifacts import Precision
from vit_export.errors import UsageError
from vit_export.export.onnx_attention import tidy_attention
from vit_export.export.peaks import measure_peaks, run_graph
from vit_export.export.trt_attention import agreement_db, attentions, quantize_attention
from vit_export.export.trt_build import build_engine
from vit_export.export.trt_graph import int8_layers, strongly_typed
from vit_export.export.trt_manifest import GraphInput
from vit_export.export.trt_options import TensorRtOptions

HEADS, CHANNELS = 2, 16


def attention(size: int = 8, *, sharp: float = 1.0, bias: bool = False, static: bool = False) -> ir.Model:
    """[N, 3, S, S] → tokens of 32 → q, k, v → attention as torch's exporter writes it → [N, 32].

    sharp: multiplies the queries, which makes probabilities more or less even.
    """
    rng = np.random.default_rng(0)
    tokens, width = size * size, HEADS * CHANNELS
    heads = np.asarray([-1, tokens, HEADS, CHANNELS])
    nodes, constants = [], {"heads": heads, "flat": np.asarray([-1, 3, tokens])}
    add = nodes.append
    add(helper.make_node("Reshape", ["images", "flat"], ["f"]))
    add(helper.make_node("Transpose", ["f"], ["t"], perm=[0, 2, 1]))
    for name, gain in (("q", sharp), ("k", 1.0), ("v", 1.0)):
        constants[f"{name}.w"] = (rng.standard_normal((3, width)) * gain).astype(np.float32)
        add(helper.make_node("MatMul", ["t", f"{name}.w"], [f"{name}2"], name=f"attn.{name}/MatMul"))
        add(helper.make_node("Reshape", [f"{name}2", "heads"], [f"{name}4"]))
        add(helper.make_node("Transpose", [f"{name}4"], [name], perm=[0, 2, 1, 3]))
    nodes += _transposed_keys(constants, tokens, static)
    constants["r"] = np.float32(CHANNELS**-0.25)
    add(helper.make_node("Mul", ["q", "r"], ["qs"]))
    add(helper.make_node("Mul", ["kt", "r"], ["ks"]))
    add(helper.make_node("MatMul", ["qs", "ks"], ["scores"], name="attn/MatMul"))
    if bias:
        constants["bias"] = rng.standard_normal((HEADS, tokens, tokens)).astype(np.float32)
        add(helper.make_node("Add", ["scores", "bias"], ["biased"], name="attn/Add"))
    source = "biased" if bias else "scores"
    add(helper.make_node("Softmax", [source], ["p"], axis=-1, name="attn/Softmax"))
    add(helper.make_node("MatMul", ["p", "v"], ["context"], name="attn/MatMul_2"))
    add(helper.make_node("Transpose", ["context"], ["c"], perm=[0, 2, 1, 3]))
    constants |= {"merge": np.asarray([-1, tokens, width]), "axis": np.asarray([1])}
    add(helper.make_node("Reshape", ["c", "merge"], ["m"]))
    add(helper.make_node("ReduceMean", ["m", "axis"], ["logits"], keepdims=0))
    for index, node in enumerate(nodes):
        node.name = node.name or f"attn/{node.op_type}_{index}"
    batch = 1 if static else "batch"
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 3, size, size])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, width])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True))


def _transposed_keys(constants: dict[str, np.ndarray], tokens: int, static: bool) -> list[onnx.NodeProto]:
    """Reshape, Transpose, Reshape with shapes that are constants or computed from k's, as torch does it."""
    shapes = []
    if static:
        constants["flat_keys"] = np.asarray([HEADS, tokens, CHANNELS])
        constants["full_keys"] = np.asarray([1, HEADS, CHANNELS, tokens])
    else:
        ends = {"zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "minus": -1}
        constants.update({name: np.asarray([number]) for name, number in ends.items()})
        shapes = [
            helper.make_node("Shape", ["k"], ["ks_shape"]),
            helper.make_node("Slice", ["ks_shape", "two", "three"], ["kn"]),
            helper.make_node("Slice", ["ks_shape", "three", "four"], ["kd"]),
            helper.make_node("Slice", ["ks_shape", "zero", "two"], ["kbh"]),
            helper.make_node("Concat", ["minus", "kn", "kd"], ["flat_keys"], axis=0),
            helper.make_node("Concat", ["kbh", "kd", "kn"], ["full_keys"], axis=0),
        ]
    return [
        *shapes,
        helper.make_node("Reshape", ["k", "flat_keys"], ["kr"]),
        helper.make_node("Transpose", ["kr"], ["krt"], perm=[0, 2, 1]),
        helper.make_node("Reshape", ["krt", "full_keys"], ["kt"]),
    ]


def images(size: int = 8, count: int = 2) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((count, 3, size, size), dtype=np.float32)


def answer(model: ir.Model, x: np.ndarray, folder: Path) -> np.ndarray:
    path = folder / f"{len(list(folder.iterdir()))}.onnx"
    ir.save(model, path)
    onnx.checker.check_model(str(path), full_check=True)
    return run_graph(path, x, threads=1)


class TestTidy:
    """Keys transposed directly, queries scaled alone."""

    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("static", [False, True])
    def test_numbers_stay(self, tmp_path, bias, static):
        """With and without a bias, shapes computed or constant: the same answer to float32's last bits."""
        model, x = attention(bias=bias, static=static), images(count=1)
        before = answer(model, x, tmp_path)
        assert tidy_attention(model) == 1
        np.testing.assert_allclose(answer(model, x, tmp_path), before, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("static", [False, True])
    def test_shape_arithmetic_is_gone(self, static):
        """One Mul and one Transpose of the keys remain; a second call finds nothing."""
        model = attention(static=static)
        tidy_attention(model)
        types = [node.op_type for node in model.graph]
        assert types.count("Mul") == 1
        assert not {"Shape", "Slice", "Concat"} & set(types)
        assert tidy_attention(model) == 0

    def test_other_reshapes_are_left(self):
        """Three nodes that move other dimensions too are not taken for a transpose."""
        model = attention(static=True)
        flat = model.graph.initializers["flat_keys"]
        flat.const_value = ir.tensor(
            np.asarray([1, 128, CHANNELS]), name="flat_keys"
        )  # joins heads and tokens
        reshaped = next(n for n in model.graph if n.outputs[0].name == "kt")
        before = [n.op_type for n in model.graph].count("Reshape")
        tidy_attention(model)
        assert reshaped in list(model.graph)
        assert [n.op_type for n in model.graph].count("Reshape") == before


class TestInt8:
    """Q/DQ on the four inputs of attention."""

    @pytest.mark.parametrize("bias", [False, True])
    def test_found_with_its_sizes(self, bias):
        """Tokens and channels a head are read off V, which has them when scores do not."""
        model = attention(bias=bias)
        tidy_attention(model)
        (found,) = attentions(model.graph)
        assert (found.tokens, found.channels, found.fusable) == (64, CHANNELS, True)

    def test_above_512_tokens_it_is_not_fusable(self):
        """23x23 patches are 529 tokens: TensorRT has no kernel, so auto leaves them."""
        model = attention(23)
        tidy_attention(model)
        (found,) = attentions(model.graph)
        assert (found.tokens, found.fusable) == (529, False)
        facts = strongly_typed(model, Precision.INT8, images(23, 1), "auto")
        assert facts["int8_attention"] == "float16 (TensorRT fuses no int8 attention of 529 tokens)"

    def test_every_input_is_int8_and_close(self, tmp_path):
        """Four symmetric pairs with scales from the measured peaks; the answer stays close."""
        model, x = attention(sharp=0.2), images()
        tidy_attention(model)
        before = answer(model, x, tmp_path)
        peaks = measure_peaks(model, [x])
        assert quantize_attention(model, peaks) == 1
        pairs = [node for node in model.graph if node.op_type == "QuantizeLinear"]
        assert len(pairs) == 4
        for node in pairs:
            scale = node.inputs[1].const_value.numpy()
            assert scale == pytest.approx(peaks[node.inputs[0].name] / 127)
            assert node.inputs[2].const_value.numpy() == 0
        after = answer(model, x, tmp_path)
        assert np.abs(after - before).max() < 0.05 * np.abs(before).max()
        assert int8_layers(model) == ("attn",)

    def test_the_real_builder_takes_it(self, tmp_path):
        """An int8 attention in a float16 graph, free batch, built by TensorRT-RTX."""
        model = attention()
        tidy_attention(model)
        facts = strongly_typed(model, Precision.INT8, images(), "on")
        assert facts["int8_attention"] == "int8 in 1 blocks (--int8-attention on)"
        path = tmp_path / "attention.onnx"
        ir.save(model, path)
        built = build_engine(path, GraphInput.of(path), TensorRtOptions(flavor="rtx", batches=(1, 2, 4)))
        assert built.engine is not None and built.warnings == ()

    def test_auto_takes_it_only_when_it_costs_little(self):
        """One block above 30 dB and one below are decided by that number."""
        decisions = {}
        for sharp in (0.2, 40.0):
            model = attention(sharp=sharp)
            tidy_attention(model)
            trial = model.clone()
            quantize_attention(trial, measure_peaks(model, [images()]))
            quality = agreement_db(model, trial, images())
            decisions[quality >= 30] = strongly_typed(model, Precision.INT8, images(), "auto")[
                "int8_attention"
            ]
        assert decisions[True].startswith("int8 in 1 blocks (")
        assert decisions[False].startswith("float16 (int8 would leave ")

    def test_without_images(self):
        """auto does without, on refuses, off says so."""
        assert (
            "no calibration images"
            in strongly_typed(attention(), Precision.INT8, None, "auto")["int8_attention"]
        )
        assert "off" in strongly_typed(attention(), Precision.INT8, images(), "off")["int8_attention"]
        with pytest.raises(UsageError, match="--int8-attention sometimes"):
            strongly_typed(attention(), Precision.INT8, None, "sometimes")
        with pytest.raises(UsageError, match="needs calibration images"):
            strongly_typed(attention(), Precision.INT8, None, "on")
