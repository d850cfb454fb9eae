"""What the real parser refuses, said in words a user can act on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from vit_export.errors import TargetError, UnsupportedOperator
from vit_export.export.trt_build import build_engine
from vit_export.export.trt_errors import explain, module_path
from vit_export.export.trt_manifest import GraphInput
from vit_export.export.trt_options import TensorRtOptions

RTX = TensorRtOptions(flavor="rtx")


def save(path: Path, nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray]) -> Path:
    """A graph from `images` [1, 3, 8, 8] to `logits`."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("other", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def refused(path: Path) -> TargetError:
    with pytest.raises(TargetError) as caught:
        build_engine(path, GraphInput.of(path), RTX)
    assert not path.with_suffix(".engine").exists()
    return caught.value


class TestOnnxRuntimeOutput:
    """Q/DQ graphs of ONNX Runtime's quantize_static, fed to the same builder."""

    @pytest.fixture
    def float_graph(self, tmp_path: Path) -> Path:
        """A patch embedding and a head, named as an exporter names them."""
        rng = np.random.default_rng(0)
        nodes = [
            helper.make_node(
                "Conv", ["images", "patch_embed.proj.weight", "patch_embed.proj.bias"], ["patches"],
                name="patch_embed.proj/Conv", strides=[4, 4],
            ),
            helper.make_node("Flatten", ["patches"], ["flat"], name="Flatten"),
            helper.make_node("Gemm", ["flat", "head.weight", "head.bias"], ["logits"], name="head.fc/Gemm"),
        ]  # fmt: skip
        constants = {
            "patch_embed.proj.weight": rng.standard_normal((8, 3, 4, 4), np.float32),
            "patch_embed.proj.bias": rng.standard_normal(8, np.float32),
            "head.weight": rng.standard_normal((32, 5), np.float32),
            "head.bias": rng.standard_normal(5, np.float32),
        }
        return save(tmp_path / "float.onnx", nodes, constants)

    def quantize(self, source: Path, **options: object) -> Path:
        from onnxruntime.quantization import CalibrationDataReader, quantize_static

        class Noise(CalibrationDataReader):  # type: ignore[misc]
            def __init__(self) -> None:
                rng = np.random.default_rng(1)
                self._left: Iterator[dict[str, np.ndarray]] = iter(
                    [{"images": rng.standard_normal((1, 3, 8, 8), np.float32)}]
                )

            def get_next(self) -> dict[str, np.ndarray] | None:
                return next(self._left, None)

        target = source.with_name("quantized.onnx")
        quantize_static(source, target, Noise(), **options)
        return target

    def refusal(self, path: Path) -> tuple[str, TargetError]:
        """(what was refused, the error), having checked that a module of the graph is named."""
        error = refused(path)
        assert isinstance(error, UnsupportedOperator)
        found = re.fullmatch(r"TensorRT-RTX refused (patch_embed\.proj|head\.fc) \((.+)\)", error.message)
        assert found, error.message
        return found[2], error

    def test_its_default_output_has_an_int32_bias(self, float_graph):
        """quantize_static as it comes: refused for the int32 bias, with the option that avoids it."""
        what, error = self.refusal(self.quantize(float_graph))
        assert what == "DequantizeLinear on an int32 bias"
        assert "QuantizeBias" in error.hint and "vit-export" in error.hint

    def test_without_that_it_has_a_zero_point(self, float_graph):
        """With float biases its asymmetric activations are next, with the symmetric options."""
        what, error = self.refusal(self.quantize(float_graph, extra_options={"QuantizeBias": False}))
        assert what == "QuantizeLinear with a non-zero zero point"
        assert "ActivationSymmetric" in error.hint

    def test_the_hints_lead_to_an_engine(self, float_graph):
        """Following both hints gives a graph the same builder takes: they are not guesses."""
        from onnxruntime.quantization import QuantType

        path = self.quantize(
            float_graph,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False},
        )
        assert build_engine(path, GraphInput.of(path), RTX).engine is not None

    def test_sixteen_bit_types_are_named(self, float_graph):
        """uint16 zero points are a type TensorRT does not have; the initialiser is named."""
        from onnxruntime.quantization import QuantType

        path = self.quantize(
            float_graph, activation_type=QuantType.QUInt16, op_types_to_quantize=["Gemm"],
            extra_options={"QuantizeBias": False},
        )  # fmt: skip
        error = refused(path)
        assert "has a data type TensorRT does not have" in error.message
        assert "head" in error.message


class TestGraphs:
    """Other graphs the parser refuses."""

    def test_an_unknown_operator(self, tmp_path):
        """An operator TensorRT lacks is named with its module."""
        node = helper.make_node("Det", ["images"], ["logits"], name="blocks.0.mlp/Det")
        error = refused(save(tmp_path / "g.onnx", [node], {}))
        assert error.message == "TensorRT-RTX refused blocks.0.mlp (operator Det is not in this TensorRT)"

    def test_a_foreign_domain(self, tmp_path):
        """So is one of another domain, for which the parser looks for a plugin."""
        node = helper.make_node("Foo", ["images"], ["logits"], name="blocks.0.mlp/Foo", domain="other")
        error = refused(save(tmp_path / "g.onnx", [node], {}))
        assert error.message == "TensorRT-RTX refused blocks.0.mlp (operator Foo is not in this TensorRT)"

    def test_mixed_types(self, tmp_path):
        """float32 times float16: strongly typed networks convert nothing, and the error says it."""
        node = helper.make_node("MatMul", ["images", "w"], ["logits"], name="blocks.0.attn.proj/MatMul")
        error = refused(save(tmp_path / "g.onnx", [node], {"w": np.ones((8, 8), np.float16)}))
        assert error.message.startswith("TensorRT-RTX refused blocks.0.attn.proj (MatMul mixes data types")

    def test_a_builder_failure_names_the_module_too(self, tmp_path):
        """What only the builder finds, FP32 products on Turing, arrives translated as well."""
        node = helper.make_node("MatMul", ["images", "w"], ["logits"], name="blocks.0.attn.proj/MatMul")
        path = save(tmp_path / "g.onnx", [node], {"w": np.ones((8, 8), np.float32)})
        with pytest.raises(TargetError, match=r"blocks\.0\.attn\.proj .*Turing") as caught:
            build_engine(
                path, GraphInput.of(path), TensorRtOptions(flavor="rtx", compute_capabilities=("7.5",))
            )
        assert "--fp16" in caught.value.hint


class TestWords:
    """The translation itself."""

    @pytest.mark.parametrize(
        ("name", "path"),
        [
            ("/blocks.3/attn/proj/MatMul", "blocks.3.attn.proj"),
            ("blocks.3.attn.proj/MatMul", "blocks.3.attn.proj"),
            ("blocks.3.attn.proj.bias_DequantizeLinear", "blocks.3.attn.proj"),
            ("blocks.3.attn.proj.weight.0_QuantizeLinear_Output", "blocks.3.attn.proj"),
            ("Flatten", ""),
            ("node_MatMul_12", ""),
            ("", ""),
        ],
    )
    def test_module_paths(self, name, path):
        """Three ways of naming give one path; a name without one gives none."""
        assert module_path(name) == path

    @pytest.mark.parametrize(
        ("said", "words"),
        [
            ("Assertion failed: shiftIsAllZeros(zeroPoint)", "non-zero zero point"),
            ("Assertion failed: TRT only supports symmetric quantization", "non-zero zero point"),
            ("Error Code 2: OutOfMemory (Requested size was 1073741824 bytes.)", "not enough GPU memory"),
        ],
    )
    def test_wordings_of_other_versions(self, tmp_path, said, words):
        """TensorRT 10 words the same refusals differently; they are recognised."""
        error = explain(said, "QuantizeLinear", "fc1/QuantizeLinear", tmp_path / "g.onnx", "TensorRT")
        assert words in error.message

    def test_tensorrt_names_a_fused_node(self, tmp_path):
        """`Could not find any implementation for node {ForeignNode[...]}` is traced to its first module."""
        said = (
            "Error Code 10: Internal Error (Could not find any implementation for node "
            "{ForeignNode[/blocks.2/attn/MatMul.../blocks.2/attn/Reshape_4]}.)"
        )
        error = explain(said, "", "", tmp_path / "g.onnx", "TensorRT")
        assert error.message.startswith("TensorRT refused blocks.2.attn (Error Code 10")
        assert "--keep-float 'blocks.2.attn'" in error.hint

    def test_unknown_words_are_passed_on(self, tmp_path):
        """A refusal nobody has seen is quoted, shortened, with its place and the graph to report."""
        error = explain("x" * 1000, "Foo", "a.b/Foo", tmp_path / "g.onnx", "TensorRT")
        assert len(error.message) < 260
        assert "a.b" in error.message and "g.onnx" in error.hint
