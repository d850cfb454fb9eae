"""Integer operators for ONNX Runtime and OpenVINO: which are written, and that numbers stay."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from vit_export.artifacts import BuildRequest, Precision, Preprocessing
from vit_export.errors import UsageError
from vit_export.export.onnx_integer import drop_zero_points, integer_attention, integer_products
from vit_export.export.targets.openvino_ir import _rest
from vit_export.export.targets.ort_model import _operators

Array = npt.NDArray[np.generic]
TOKENS, WIDTH, HEADS = 16, 48, 3
X = np.random.default_rng(1).standard_normal((3, TOKENS, WIDTH)).astype(np.float32)


class Graph:
    """A small quantised graph being written by hand; its input is `x`, quantised once as `d`."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)
        self.nodes: list[Any] = []
        self.constants: dict[str, Array] = {"s": np.float32(0.03), "z": np.uint8(120)}  # type: ignore[dict-item]
        self.add("QuantizeLinear", ["x", "s", "z"], ["q"])
        self.add("DequantizeLinear", ["q", "s", "z"], ["d"])

    def add(self, kind: str, inputs: list[str], outputs: list[str], **attributes: object) -> None:
        """One node."""
        name = f"block.{outputs[0]}/{kind}"
        self.nodes.append(helper.make_node(kind, inputs, outputs, name=name, **attributes))

    def linear(self, name: str, width: int = WIDTH, bias: str = "Add") -> str:
        """d Wᵀ plus or minus a bias; weights of one width share their zero points, as the exporter does."""
        weight = self.random.integers(-127, 128, (WIDTH, width))
        zeros = f"zeros{width}"
        self.constants |= {
            f"{name}.w": weight.astype(np.int8),
            f"{name}.s": self.random.uniform(0.001, 0.01, width).astype(np.float32),
            f"{name}.b": self.random.standard_normal(width).astype(np.float32),
            zeros: np.zeros(width, np.int8),
        }
        self.add("DequantizeLinear", [f"{name}.w", f"{name}.s", zeros], [f"{name}.d"], axis=1)
        self.add("MatMul", ["d", f"{name}.d"], [f"{name}.m"])
        self.add(bias, [f"{name}.m", f"{name}.b"], [f"{name}.o"])
        return f"{name}.o"

    def attention(self, inputs: list[str]) -> onnx.ModelProto:
        """The whole model, ending in Attention."""
        self.add("Attention", inputs, ["y"], q_num_heads=HEADS, kv_num_heads=HEADS)
        return self.model()

    def model(self) -> onnx.ModelProto:
        """The whole model, ending in `y`."""
        shape: list[str | int] = ["batch", TOKENS, WIDTH]
        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy"]
        constants = [numpy_helper.from_array(np.asarray(a), n) for n, a in self.constants.items()]
        graph = helper.make_graph(self.nodes, "g", ends[:1], ends[1:], constants)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
        return onnx.shape_inference.infer_shapes(made)


def run(model: onnx.ModelProto) -> Array:
    """The output for X in ONNX Runtime."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": X})[0]


def rewritten(model: onnx.ModelProto) -> tuple[onnx.ModelProto, Counter[str]]:
    """The model in ONNX Runtime's own operators, checked, and how many there are of each."""
    graph = ir.serde.deserialize_model(model)
    drop_zero_points(graph)
    integer_products(graph)
    integer_attention(graph)
    made = ir.serde.serialize_model(graph)
    onnx.checker.check_model(made, full_check=True)
    return made, Counter(node.op_type for node in made.graph.node)


def test_a_joined_qkv_becomes_one_operator() -> None:
    """QuantizeLinear and QAttention remain; the output is the same to rounding."""
    graph = Graph()
    graph.add("Split", [graph.linear("qkv", 3 * WIDTH)], ["a", "b", "c"], axis=-1, num_outputs=3)
    model = graph.attention(["a", "b", "c"])
    made, kinds = rewritten(model)
    assert kinds == {"QuantizeLinear": 1, "QAttention": 1}
    np.testing.assert_allclose(run(made), run(model), atol=1e-4)


def test_separate_queries_keys_and_values_are_joined() -> None:
    """Three linears that read one tensor become one weight, a subtracted bias turned round."""
    graph = Graph()
    model = graph.attention([graph.linear("q"), graph.linear("k"), graph.linear("v", bias="Sub")])
    made, kinds = rewritten(model)
    assert kinds == {"QuantizeLinear": 1, "QAttention": 1}
    np.testing.assert_allclose(run(made), run(model), atol=1e-4)


def test_attention_with_a_bias_stays() -> None:
    """QAttention cannot add a bias to the scores: Attention remains, its linears are integer."""
    graph = Graph()
    graph.constants["bias"] = np.ones((1, HEADS, TOKENS, TOKENS), np.float32)
    model = graph.attention([*(graph.linear(name) for name in "qkv"), "bias"])
    made, kinds = rewritten(model)
    assert kinds == {"QuantizeLinear": 1, "MatMulIntegerToFloat": 3, "Attention": 1}
    np.testing.assert_allclose(run(made), run(model), atol=1e-4)


def test_openvino_multiplies_every_linear_in_integers() -> None:
    """Two weights that share an array of zeros both run in integers once it is dropped."""
    import openvino

    graph = Graph()
    graph.add("Mul", [graph.linear("first"), graph.linear("second")], ["y"])
    model = ir.serde.deserialize_model(graph.model())
    drop_zero_points(model)
    data = ir.serde.serialize_model(model).SerializeToString()
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(data, b""), "CPU", {"INFERENCE_NUM_THREADS": 1})
    info = [node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops()]
    types = [str(i["runtimePrecision"].value) for i in info if i["layerType"].value == "FullyConnected"]
    assert len(types) == 2 and all("8" in kind for kind in types), types


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.INT8])
def test_choices_are_checked(precision: Precision) -> None:
    """A value that is none of the choices is answered with them; int8 alone leaves the rest to OpenVINO."""
    request = BuildRequest(precision, None, Preprocessing((8, 8)))  # type: ignore[arg-type]
    assert _rest(request) == ("auto" if precision is Precision.INT8 else "f32")
    with pytest.raises(UsageError, match="unknown --onnx-operators 'fast'"):
        _operators({"onnx_operators": "fast"})
