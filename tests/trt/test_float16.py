"""float32 to float16: the numbers survive, and what float16 cannot hold stays float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper

from vit_export.errors import NumericsError, TargetError, UnsupportedOperator
from vit_export.export.float16_scales import half_scale, requantize, round_scales
from vit_export.export.peaks import measure_peaks, run_graph
from vit_export.export.to_float16 import to_float16

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


def graph(nodes, constants: dict[str, np.ndarray], shape=("batch", 3, 4, 4), opset: int = 20) -> ir.Model:
    """A model over `x` (float32) with output `y`; unnamed nodes are named after their operator."""
    for index, node in enumerate(nodes):
        node.name = node.name or f"layer{index}/{node.op_type}"
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model, strict_mode=True))


def answers(model: ir.Model, images: np.ndarray, folder: Path) -> np.ndarray:
    path = folder / f"{len(list(folder.iterdir()))}.onnx"
    ir.save(model, path)
    onnx.checker.check_model(str(path), full_check=True)
    return run_graph(path, images, threads=1)


def sqnr_db(reference: np.ndarray, other: np.ndarray) -> float:
    noise = ((reference.astype(np.float64) - other) ** 2).sum()
    return float(10 * np.log10((reference.astype(np.float64) ** 2).sum() / noise))


def halves(model: ir.Model) -> set[str]:
    return {v.name or "" for node in model.graph for v in node.outputs if v.dtype == HALF}


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, 3, 4, 4), dtype=np.float32)


def mlp(rng: np.random.Generator, scale: float = 1.0) -> ir.Model:
    """Flatten → Gemm → LayerNormalization → Gelu → Gemm."""
    weights = {
        "w1": rng.standard_normal((48, 32), np.float32) * scale,
        "b1": rng.standard_normal(32, np.float32),
        "g": np.ones(32, np.float32),
        "w2": rng.standard_normal((32, 8), np.float32),
    }
    return graph(
        [
            helper.make_node("Flatten", ["x"], ["f"]),
            helper.make_node("Gemm", ["f", "w1", "b1"], ["h"], name="fc1/Gemm"),
            helper.make_node("LayerNormalization", ["h", "g"], ["n"], name="norm/LayerNormalization"),
            helper.make_node("Gelu", ["n"], ["a"], name="act/Gelu"),
            helper.make_node("MatMul", ["a", "w2"], ["y"], name="fc2/MatMul"),
        ],
        weights,
    )


class TestNumerics:
    """What must not change."""

    def test_result_is_close_and_types_at_the_border_stay(self, x, tmp_path):
        """Input and output keep name and float32; all between is float16; the answer within 55 dB."""
        model = mlp(np.random.default_rng(1))
        before = answers(model, x, tmp_path)
        report = to_float16(model, measure_peaks(model, [x]))
        assert (model.graph.inputs[0].name, model.graph.inputs[0].dtype) == ("x", FLOAT)
        assert (model.graph.outputs[0].name, model.graph.outputs[0].dtype) == ("y", FLOAT)
        floats = [n.op_type for n in model.graph for v in n.outputs if v.dtype == FLOAT]
        assert floats == ["Cast"]
        assert all(v.dtype == HALF for v in model.graph.initializers.values() if v.dtype != ir.DataType.INT64)
        assert report.kept == {}
        assert sqnr_db(before, answers(model, x, tmp_path)) >= 55

    def test_without_ranges_normalisations_stay_float32(self, x, tmp_path):
        """Nothing measured means no square is trusted to float16."""
        model = mlp(np.random.default_rng(1))
        report = to_float16(model)
        assert report.kept == {"norm/LayerNormalization": "no ranges were measured"}
        assert "n" not in halves(model) and "a" in halves(model)

    def test_a_second_conversion_changes_nothing(self, x, tmp_path):
        """The pass finds nothing left to do in its own output."""
        model = mlp(np.random.default_rng(1))
        to_float16(model, {})
        once = answers(model, x, tmp_path)
        to_float16(model, {})
        assert np.array_equal(once, answers(model, x, tmp_path))

    def test_the_source_of_a_clone_is_untouched(self, x, tmp_path):
        """Values of a clone share types with their source; converting one must not reach the other."""
        model = mlp(np.random.default_rng(1))
        before = answers(model, x, tmp_path)
        to_float16(model.clone(), {})
        assert np.array_equal(before, answers(model, x, tmp_path))

    def test_rounded_runs_round(self, tmp_path):
        """ONNX Runtime keeps float32 between float16 nodes; `rounded` stores 1/3 as float16 does."""
        model = graph(
            [helper.make_node("Div", ["x", "three"], ["d"]), helper.make_node("Sub", ["d", "third"], ["y"])],
            {"three": np.float32(3), "third": np.float32(1 / 3)},
        )
        to_float16(model, {})
        path = tmp_path / "third.onnx"
        ir.save(model, path)
        ones = np.ones((1, 3, 4, 4), np.float32)
        assert (run_graph(path, ones, threads=1, rounded=True) == 0).all()


class TestOverflow:
    """Numbers beyond 65504."""

    def test_measured_overflow_stays_float32(self, x, tmp_path):
        """A product that reaches 1e5 is computed in float32 and is right; without ranges it is Inf."""
        model = mlp(np.random.default_rng(1), scale=2e4)
        before = answers(model, x, tmp_path)
        blind = model.clone()
        to_float16(blind, {})
        assert not np.isfinite(answers(blind, x, tmp_path)).all()
        report = to_float16(model, measure_peaks(model, [x]))
        assert {"fc1/Gemm", "norm/LayerNormalization"} <= set(report.kept)
        assert "reaches" in report.kept["fc1/Gemm"]
        assert sqnr_db(before, answers(model, x, tmp_path)) >= 50

    def test_squares_overflow_before_values_do(self, x):
        """A normalisation of values near 500 sums squares of 250000: it alone stays float32."""
        model = mlp(np.random.default_rng(1), scale=20.0)
        report = to_float16(model, measure_peaks(model, [x]))
        assert list(report.kept) == ["norm/LayerNormalization"]
        assert "squares" in report.kept["norm/LayerNormalization"]

    def test_a_long_sum_overflows_before_its_terms_do(self, tmp_path):
        """The sum of 16 values near 10000 is foreseen from the range of its input and its shape."""
        model = graph(
            [
                helper.make_node("Mul", ["x", "big"], ["s"]),
                helper.make_node("ReduceMean", ["s", "axes"], ["y"], name="pool/ReduceMean", keepdims=0),
            ],
            {"big": np.float32(1e4), "axes": np.asarray([2, 3])},
        )
        x = np.ones((1, 3, 4, 4), np.float32)
        report = to_float16(model, measure_peaks(model, [x]))
        assert "its sum may reach" in report.kept["pool/ReduceMean"]
        np.testing.assert_allclose(answers(model, x, tmp_path), 1e4, rtol=1e-3)

    def test_mask_constants_saturate(self, x, tmp_path):
        """An additive mask of -3.4e38 becomes -65504 and still masks; it is reported."""
        mask = np.zeros((4, 4), np.float32)
        mask[:, 0] = np.finfo(np.float32).min
        model = graph(
            [
                helper.make_node("Add", ["x", "mask"], ["m"], name="attn/Add"),
                helper.make_node("Softmax", ["m"], ["y"], axis=-1, name="attn/Softmax"),
            ],
            {"mask": mask},
        )
        before = answers(model, x, tmp_path)
        peaks = measure_peaks(model, [x])
        report = to_float16(model, {name: peak for name, peak in peaks.items() if name != "m"})
        assert report.saturated == ("mask",)
        after = answers(model, x, tmp_path)
        assert (after[..., 0] == 0).all()
        np.testing.assert_allclose(after, before, atol=1e-3)

    def test_a_weight_beyond_float16_keeps_its_layer(self, x, tmp_path):
        """A weight of 1e5 is no mask: its product stays float32 with its exact weight."""
        weight = np.full((4, 4), 1e5, np.float32)
        model = graph([helper.make_node("MatMul", ["x", "w"], ["y"], name="fc/MatMul")], {"w": weight})
        before = answers(model, x, tmp_path)
        report = to_float16(model, {})
        assert "w reaches" in report.kept["fc/MatMul"]
        assert np.array_equal(before, answers(model, x, tmp_path))

    def test_a_vanishing_epsilon_keeps_its_division(self, tmp_path):
        """1e-12 is 0 in float16; the guard against 0/0 must go on guarding."""
        model = graph(
            [
                helper.make_node("ReduceL2", ["x", "axes"], ["l"], keepdims=1),
                helper.make_node("Max", ["l", "eps"], ["m"], name="norm/Max"),
                helper.make_node("Div", ["x", "m"], ["y"], name="norm/Div"),
            ],
            {"axes": np.asarray([3]), "eps": np.float32(1e-12)},
        )
        zeros = np.zeros((1, 3, 4, 4), np.float32)
        report = to_float16(model, measure_peaks(model, [zeros]))
        assert "is 0 in float16" in report.kept["norm/Max"]

    def test_peaks_are_the_largest_magnitudes(self, x):
        """measure_peaks agrees with numpy over several batches."""
        model = graph([helper.make_node("Mul", ["x", "two"], ["y"])], {"two": np.float32(-2)})
        peaks = measure_peaks(model, [x[:1], x[1:]])
        assert peaks == {"y": pytest.approx(float(np.abs(x).max() * 2))}

    def test_nan_is_named_where_it_appears(self):
        """A graph that is NaN in float32 is refused with the tensor's name, not converted."""
        model = graph(
            [helper.make_node("Sqrt", ["x"], ["root"]), helper.make_node("Neg", ["root"], ["y"])], {}
        )
        with pytest.raises(NumericsError, match="root"):
            measure_peaks(model, [-np.ones((1, 3, 4, 4), np.float32)])


class TestOperators:
    """Operators with opinions about types."""

    def test_resize_keeps_its_float32_scales(self, x, tmp_path):
        """Resize takes float16 data but float32 scales by definition."""
        model = graph(
            [helper.make_node("Resize", ["x", "", "scales"], ["y"], mode="nearest", name="up/Resize")],
            {"scales": np.asarray([1, 1, 2, 2], np.float32)},
        )
        before = answers(model, x, tmp_path)
        to_float16(model, {})
        np.testing.assert_allclose(answers(model, x, tmp_path), before, rtol=1e-3)
        assert model.graph.initializers["scales"].dtype == FLOAT

    def test_casts_and_fills_follow(self, tmp_path):
        """Cast to float and ConstantOfShape write float16, so the Add behind them has one type."""
        fill = helper.make_tensor("value", TensorProto.FLOAT, [1], [0.5])
        model = graph(
            [
                helper.make_node("Shape", ["x"], ["shape"]),
                helper.make_node("ConstantOfShape", ["shape"], ["half"], value=fill),
                helper.make_node("Cast", ["x"], ["i"], to=TensorProto.INT32),
                helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
                helper.make_node("Add", ["half", "f"], ["y"]),
            ],
            {},
        )
        to_float16(model, {})
        images = np.full((1, 3, 4, 4), 2.7, np.float32)
        np.testing.assert_array_equal(answers(model, images, tmp_path), 2.5)

    def test_a_constant_read_in_both_types_exists_twice(self, x, tmp_path):
        """A tensor shared by a float32 island and a float16 node is exact for the first."""
        model = graph(
            [
                helper.make_node("Add", ["x", "c"], ["a"], name="kept/Add"),
                helper.make_node("Mul", ["a", "c"], ["y"], name="free/Mul"),
            ],
            {"c": np.full((4, 4), 1.0001, np.float32)},
        )
        report = to_float16(model, {}, keep=["kept"])
        assert report.kept == {"kept/Add": "asked for by kept"}
        types = {value.dtype for value in model.graph.initializers.values()}
        assert types == {FLOAT, HALF}
        answers(model, x, tmp_path)

    def test_control_flow_is_refused(self):
        """A node with a subgraph is refused by name rather than half converted."""
        branch = helper.make_graph(
            [helper.make_node("Identity", ["x"], ["z"])], "b", [],
            [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
        )  # fmt: skip
        node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch, name="gate/If")
        with pytest.raises(UnsupportedOperator, match="gate/If"):
            to_float16(graph([node], {"c": np.asarray(True)}))


def quantized_mlp(weight_scale: np.ndarray, activation_scale: float = 0.03, opset: int = 20) -> ir.Model:
    """x → Q/DQ → MatMul with a per-channel int8 weight → y."""
    codes = np.random.default_rng(3).integers(-127, 128, (4, 6)).astype(np.int8)
    return graph(
        [
            helper.make_node("QuantizeLinear", ["x", "sx", "z"], ["q"], name="fc/QuantizeLinear"),
            helper.make_node("DequantizeLinear", ["q", "sx", "z"], ["d"], name="fc/DequantizeLinear"),
            helper.make_node(
                "DequantizeLinear", ["w", "sw", "zw"], ["dw"], axis=1, name="fc/DequantizeLinear_2"
            ),
            helper.make_node("MatMul", ["d", "dw"], ["y"], name="fc/MatMul"),
        ],
        {
            "sx": np.float32(activation_scale),
            "z": np.int8(0),
            "w": codes,
            "sw": weight_scale.astype(np.float32),
            "zw": np.zeros(6, np.int8),
        },
        opset=opset,
    )


class TestScales:
    """Q/DQ scales in float16."""

    @given(hnp.arrays(np.float32, st.integers(1, 20), elements=st.floats(np.float32(1e-9), 1e3, width=32)))
    def test_a_half_scale_is_representable_and_covers(self, scales):
        """The chosen scale survives float16 exactly, is never 0, and in the coarse range never smaller."""
        chosen = half_scale(scales)
        assert np.array_equal(chosen, chosen.astype(np.float16).astype(np.float32))
        assert (chosen > 0).all()
        small = scales < 2.0**-14
        assert (chosen[small] >= scales[small]).all()
        np.testing.assert_allclose(chosen[~small], scales[~small], rtol=2**-11)

    @given(
        hnp.arrays(np.int8, (5, 3), elements=st.integers(-127, 127)),
        hnp.arrays(np.float32, 3, elements=st.floats(np.float32(1e-8), 1, width=32)),
    )
    def test_requantised_weights_stay_within_half_a_step(self, codes, scales):
        """Real values move by at most half a new step; with an unchanged scale not at all."""
        new = half_scale(scales)
        real, moved = (
            codes * scales.astype(np.float64),
            requantize(codes, scales, new, 1) * new.astype(np.float64),
        )
        gain = np.abs(real) * np.abs(new / scales.astype(np.float64) - 1).clip(max=2**-11)
        assert (np.abs(real - moved) <= new.astype(np.float64) / 2 + gain + 1e-12).all()
        assert np.array_equal(requantize(codes, scales, scales, 1), codes)

    def test_tiny_scales_become_float16_with_the_rest(self, x, tmp_path):
        """A channel whose scale float16 stores to one bit is requantised: no scale is left float32."""
        scale = np.asarray([2e-3, 1e-3, 7e-8, 3e-7, 5e-4, 1e-2])
        model = quantized_mlp(scale, activation_scale=2**-5)
        x = np.round(x * 32) / 32  # on the activation grid: only the weights' rounding is seen
        before = answers(model, x, tmp_path)
        report = to_float16(model, {})
        assert report.kept == {}
        scales = [node.inputs[1].dtype for node in model.graph if "quantize" in node.op_type.lower()]
        assert scales == [HALF] * 3
        after = answers(model, x, tmp_path)
        moved = np.where(scale < 2**-14, half_scale(scale.astype(np.float32)) / 2, 0)  # by weight, at most
        step = np.abs(x).sum(axis=-1, keepdims=True) * moved
        rounding = 2.0**-24 + 2e-3 * np.abs(before).max(axis=(0, 1, 2))  # of float16 outputs, by channel
        assert (np.abs(before - after) <= step + rounding).all()

    def test_rounding_alone_keeps_the_types(self):
        """round_scales leaves float32 scales, now with float16 values, and integers where it can."""
        model = quantized_mlp(np.asarray([2e-3, 1e-3, 1e-3, 3e-3, 5e-4, 1e-2]))
        codes = model.graph.initializers["w"].const_value.numpy()
        round_scales(model)
        weight = next(n for n in model.graph if n.name == "fc/DequantizeLinear_2")
        assert np.array_equal(weight.inputs[0].const_value.numpy(), codes)
        scale = weight.inputs[1].const_value.numpy()
        assert scale.dtype == np.float32
        assert np.array_equal(scale, scale.astype(np.float16))

    def test_a_float32_product_has_float32_scales_on_both_sides(self, x):
        """Where an int8 product overflows float16, both its scales stay float32: runtimes want one type."""
        model = quantized_mlp(np.full(6, 50.0), activation_scale=10.0)
        report = to_float16(model, measure_peaks(model, [x * 100]))
        assert "fc/MatMul" in report.kept
        types = {node.inputs[1].dtype for node in model.graph if "quantize" in node.op_type.lower()}
        assert types == {FLOAT}

    def test_opset_18_is_refused(self):
        """float16 scales exist from opset 19 on; the error says so."""
        with pytest.raises(TargetError, match="opset 19"):
            to_float16(quantized_mlp(np.full(6, 1e-3), opset=18))
