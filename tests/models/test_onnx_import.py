"""ONNX files as torch modules: operator by operator and whole models, against ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.export import Dim

from contracts.families import FAMILIES, images
from vit_export.errors import BadSize, InputError, ParityError, UnsupportedOperator, UsageError
from vit_export.models import LoadOptions, adapt, load
from vit_export.models import onnx_source as source
from vit_export.models.onnx_build import build
from vit_export.models.onnx_layers import LAYERS
from vit_export.models.onnx_module import Step
from vit_export.models.onnx_names import clean, layer_path
from vit_export.models.onnx_ops import OPS

_RNG = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray[Any, Any]:
    return _RNG.standard_normal(shape).astype(np.float32)


def ints(*values: int) -> np.ndarray[Any, Any]:
    return np.array(values, np.int64)


def model_of(
    nodes: list[onnx.NodeProto],
    shape: tuple[int | str, ...],
    constants: dict[str, np.ndarray[Any, Any]] | None = None,
    opset: int = 17,
    outputs: tuple[str, ...] = ("y",),
) -> onnx.ModelProto:
    """A model on input x [shape] whose named outputs have any type and shape."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_empty_tensor_value_info(name) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def agrees(model: onnx.ModelProto, x: np.ndarray[Any, Any]) -> None:
    """The import computes what ONNX Runtime computes, every output."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    theirs = session.run(None, {"x": x})
    with torch.no_grad():
        result = build(model)(torch.from_numpy(x))
    ours = list(result.values()) if isinstance(result, dict) else [result]
    for one, other in zip(theirs, ours, strict=True):
        assert list(one.shape) == list(other.shape)
        np.testing.assert_allclose(other.numpy().astype(one.dtype), one, rtol=1e-4, atol=1e-5)


# operator, shape of x, other inputs in order (None: absent), attributes, opset
Row = tuple[str, tuple[int, ...], list[Any], dict[str, Any], int]
_OPERATORS: list[Row] = [
    *((op, (2, 3), [floats(2, 3)], {}, 17) for op in ("Add", "Sub", "Mul", "Div", "Min", "Max", "Sum")),
    ("Pow", (2, 3), [np.float32(2.0)], {}, 17),
    ("Mul", (2, 3), [np.array([0.5], np.float32)], {}, 17),
    *(
        (op, (2, 3), [], {}, 17)
        for op in ("Neg", "Abs", "Floor", "Ceil", "Round", "Exp", "Erf", "Sin", "Cos")
    ),
    *((op, (2, 3), [], {}, 17) for op in ("Sign", "Relu", "LeakyRelu", "Elu", "Sigmoid", "Tanh", "Softplus")),
    *((op, (2, 3), [], {}, 17) for op in ("Reciprocal", "HardSwish", "HardSigmoid", "IsNaN", "Identity")),
    ("LeakyRelu", (2, 3), [], {"alpha": 0.3}, 17),
    ("HardSigmoid", (2, 3), [], {"alpha": 0.3, "beta": 0.4}, 17),
    ("Gelu", (2, 3), [], {}, 20),
    ("Gelu", (2, 3), [], {"approximate": "tanh"}, 20),
    ("Clip", (2, 3), [np.float32(-0.5), np.float32(0.5)], {}, 17),
    ("Clip", (2, 3), [None, np.float32(0.5)], {}, 17),
    *((op, (2, 3), [floats(2, 3)], {}, 17) for op in ("Equal", "Greater", "GreaterOrEqual")),
    *((op, (2, 3), [floats(2, 3)], {}, 17) for op in ("Less", "LessOrEqual")),
    ("Cast", (2, 3), [], {"to": TensorProto.INT64}, 17),
    ("Cast", (2, 3), [], {"to": TensorProto.BOOL}, 17),
    ("Softmax", (2, 3, 4), [], {}, 17),
    ("Softmax", (2, 3, 4), [], {"axis": 1}, 17),
    ("Softmax", (2, 3, 4), [], {}, 11),
    ("LogSoftmax", (2, 3, 4), [], {"axis": -1}, 17),
    *(
        (op, (2, 3, 4), [], {"axes": [1], "keepdims": k}, 11)
        for op in ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL2")
        for k in (0, 1)
    ),
    ("ReduceSum", (2, 3, 4), [ints(-1, 1)], {"keepdims": 0}, 17),
    ("ReduceMean", (2, 3, 4), [ints(2)], {}, 20),
    ("ReduceMean", (2, 3, 4), [], {}, 17),
    ("ReduceMean", (2, 3, 4), [], {"noop_with_empty_axes": 1}, 20),
    ("LayerNormalization", (2, 3, 4), [floats(4), floats(4)], {"epsilon": 1e-6}, 17),
    ("LayerNormalization", (2, 3, 4), [floats(3, 4)], {"axis": 1}, 17),
    ("BatchNormalization", (2, 3, 4, 4), [floats(3), floats(3), floats(3), floats(3) ** 2], {}, 17),
    ("InstanceNormalization", (2, 3, 4, 4), [floats(3), floats(3)], {}, 17),
    ("GroupNormalization", (2, 4, 3, 3), [floats(4), floats(4)], {"num_groups": 2}, 21),
    ("RMSNormalization", (2, 3, 4), [floats(4)], {}, 23),
    ("MatMul", (2, 3, 4), [floats(4, 5)], {}, 17),
    ("MatMul", (2, 3, 4), [floats(2, 4, 5)], {}, 17),
    ("Gemm", (2, 4), [floats(4, 5), floats(5)], {}, 17),
    ("Gemm", (2, 4), [floats(5, 4), floats(5)], {"transB": 1}, 17),
    ("Gemm", (4, 2), [floats(5, 4), floats(2, 5)], {"transA": 1, "transB": 1, "alpha": 0.5, "beta": 2.0}, 17),
    ("Gemm", (2, 4), [floats(4, 5)], {}, 17),
    ("Conv", (2, 3, 8, 8), [floats(5, 3, 2, 2), floats(5)], {"strides": [2, 2]}, 17),
    ("Conv", (2, 3, 8, 8), [floats(5, 3, 3, 3)], {"pads": [1, 0, 2, 1]}, 17),
    ("Conv", (2, 4, 8, 8), [floats(4, 1, 3, 3), floats(4)], {"group": 4, "pads": [1] * 4}, 17),
    ("Conv", (2, 3, 8, 8), [floats(5, 3, 3, 3)], {"dilations": [2, 2]}, 17),
    ("Conv", (2, 3, 8), [floats(5, 3, 3)], {}, 17),
    ("ConvTranspose", (2, 3, 4, 4), [floats(3, 5, 2, 2), floats(5)], {"strides": [2, 2]}, 17),
    (
        "ConvTranspose",
        (2, 4, 4, 4),
        [floats(4, 1, 3, 3)],
        {"group": 4, "pads": [1] * 4, "strides": [2, 2], "output_padding": [1, 1]},
        17,
    ),
    *(
        ("Resize", (2, 3, 4, 6), [None, None, ints(2, 3, 7, 5)], {"mode": mode}, 17)
        for mode in ("linear", "cubic")
    ),
    ("Resize", (2, 3, 4, 6), [None, np.array([1, 1, 2.5, 0.5], np.float32)], {"mode": "cubic"}, 17),
    (
        "Resize",
        (2, 3, 4, 6),
        [None, np.array([1, 1, 2, 2], np.float32)],
        {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
        13,
    ),
    ("AveragePool", (2, 3, 8, 8), [], {"kernel_shape": [2, 2], "strides": [2, 2]}, 17),
    ("AveragePool", (2, 3, 7, 7), [], {"kernel_shape": [3, 3], "pads": [1] * 4, "count_include_pad": 1}, 17),
    ("MaxPool", (2, 3, 8, 8), [], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1] * 4}, 17),
    ("GlobalAveragePool", (2, 3, 8, 8), [], {}, 17),
    ("Einsum", (2, 3, 4), [floats(2, 5, 4)], {"equation": "bik,bjk->bij"}, 17),
    ("Attention", (2, 2, 3, 4), [floats(2, 2, 5, 4), floats(2, 2, 5, 4)], {}, 23),
    ("Attention", (2, 2, 3, 4), [floats(2, 2, 5, 4), floats(2, 2, 5, 4), floats(3, 5)], {"scale": 0.3}, 23),
    ("Attention", (2, 3, 8), [floats(2, 5, 8), floats(2, 5, 8)], {"q_num_heads": 2, "kv_num_heads": 2}, 23),
    ("Reshape", (2, 3, 4), [ints(0, -1)], {}, 17),
    ("Reshape", (2, 3, 4), [ints(4, 6)], {}, 17),
    ("Flatten", (2, 3, 4), [], {}, 17),
    ("Flatten", (2, 3, 4), [], {"axis": 2}, 17),
    ("Flatten", (2, 3, 4), [], {"axis": -1}, 17),
    ("Transpose", (2, 3, 4), [], {"perm": [0, 2, 1]}, 17),
    ("Transpose", (2, 3, 4), [], {}, 17),
    ("Unsqueeze", (2, 3), [ints(0, -1)], {}, 17),
    ("Unsqueeze", (2, 3), [], {"axes": [1]}, 11),
    ("Squeeze", (2, 1, 3, 1), [ints(1, -1)], {}, 17),
    ("Squeeze", (2, 1, 3, 1), [], {}, 17),
    ("Concat", (2, 3), [floats(2, 5)], {"axis": -1}, 17),
    ("Split", (2, 6), [ints(1, 2, 3)], {"axis": 1}, 17),
    ("Split", (2, 6), [], {"axis": 1, "split": [2, 2, 2]}, 11),
    ("Split", (2, 6), [], {"axis": 1, "num_outputs": 3}, 18),
    ("Slice", (4, 6), [ints(1, 0), ints(3, 2**62), ints(0, 1), ints(1, 2)], {}, 17),
    ("Slice", (4, 6), [ints(-1), ints(-(2**62)), ints(1), ints(-2)], {}, 17),
    ("Slice", (4, 6), [ints(1), ints(3)], {}, 17),
    ("Gather", (4, 6), [ints(2)], {"axis": 1}, 17),
    ("Gather", (4, 6), [np.array(-1)], {"axis": 1}, 17),
    ("Gather", (4, 6), [np.array([[0, -1], [2, 3]])], {"axis": 0}, 17),
    ("Gather", (4, 6), [np.arange(80) % 6], {"axis": 1}, 17),
    ("GatherElements", (2, 3), [np.array([[0, 2], [1, 1]])], {"axis": 1}, 17),
    ("GatherND", (2, 3, 4), [np.array([[0, 2], [1, 1]])], {}, 17),
    ("Expand", (3, 1), [ints(2, 1, 4)], {}, 17),
    ("Tile", (2, 3), [ints(2, 2)], {}, 17),
    ("Pad", (2, 3), [ints(0, 1, 2, 0), np.float32(0.5)], {}, 17),
    ("Pad", (2, 3, 4), [ints(1, 2), np.float32(0.0), ints(-1)], {}, 18),
    ("DepthToSpace", (2, 8, 3, 3), [], {"blocksize": 2}, 17),
    ("DepthToSpace", (2, 8, 3, 3), [], {"blocksize": 2, "mode": "CRD"}, 17),
    ("SpaceToDepth", (2, 2, 4, 4), [], {"blocksize": 2}, 17),
    ("ScatterND", (4, 3), [np.array([[0], [2]]), floats(2, 3)], {}, 17),
    ("Trilu", (4, 4), [], {}, 17),
    ("Trilu", (4, 4), [np.array(-1)], {"upper": 0}, 17),
    ("CumSum", (2, 3), [np.array(1)], {}, 17),
    ("Dropout", (2, 3), [], {}, 17),
    ("Shape", (2, 3), [], {"start": 1}, 17),
    ("Size", (2, 3), [], {}, 17),
]
# Values a domain needs: square roots of positives, and the like.
_POSITIVE = ("Sqrt", "Log")
# Operators that come with others, in the graphs further down.
_ELSEWHERE = {"And", "Or", "Not", "Where", "Mod", "ConstantOfShape", "Range"}


@pytest.mark.parametrize("row", _OPERATORS, ids=lambda row: f"{row[0]}-{row[4]}-{sorted(row[3])}")
def test_an_operator_computes_what_onnx_runtime_computes(row: Row) -> None:
    """Each operator, with its attributes and the older spellings of its inputs."""
    op, shape, others, attributes, opset = row
    constants = {f"c{i}": np.asarray(v) for i, v in enumerate(others) if v is not None}
    names = ["x", *(f"c{i}" if v is not None else "" for i, v in enumerate(others))]
    outputs = tuple(f"y{i}" for i in range(3)) if op == "Split" else ("y",)
    node = helper.make_node(op, names, list(outputs), **attributes)
    agrees(model_of([node], shape, constants, opset, outputs), floats(*shape))


@pytest.mark.parametrize("op", _POSITIVE)
def test_an_operator_of_positive_numbers(op: str) -> None:
    """Square root and logarithm where they are defined."""
    agrees(model_of([helper.make_node(op, ["x"], ["y"])], (2, 3)), np.abs(floats(2, 3)) + 0.1)


def test_logic_and_masks() -> None:
    """Where, And, Or, Not on comparisons, with a scalar and -inf as the other branch."""
    nodes = [
        helper.make_node("Greater", ["x", "low"], ["a"]),
        helper.make_node("Less", ["x", "high"], ["b"]),
        helper.make_node("And", ["a", "b"], ["both"]),
        helper.make_node("Not", ["both"], ["none"]),
        helper.make_node("Or", ["both", "none"], ["every"]),
        helper.make_node("Where", ["both", "x", "minus"], ["kept"]),
        helper.make_node("Softmax", ["kept"], ["soft"]),
        helper.make_node("Where", ["every", "soft", "x"], ["y"]),
    ]
    constants = {"low": np.float32(-1), "high": np.float32(1), "minus": np.float32(-1e9)}
    agrees(model_of(nodes, (4, 6), {k: np.asarray(v) for k, v in constants.items()}), floats(4, 6))


def test_every_operator_of_the_table_is_tested() -> None:
    """An operator added to OPS without a row here fails."""
    tested = {row[0] for row in _OPERATORS} | set(_POSITIVE) | _ELSEWHERE
    assert set(OPS) | set(LAYERS) <= tested


def shape_arithmetic() -> tuple[list[onnx.NodeProto], dict[str, np.ndarray[Any, Any]]]:
    """What TorchScript's exporter writes for reshape(B, -1, heads, dim) and expand(B, -1, -1)."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "zero"], ["batch"]),
        helper.make_node("Gather", ["shape", "two"], ["width"]),
        helper.make_node("Div", ["width", "heads"], ["dim"]),
        helper.make_node("Mod", ["width", "heads"], ["rest"]),
        helper.make_node("Add", ["dim", "rest"], ["dim2"]),
        *(helper.make_node("Unsqueeze", [n, "axis"], [f"{n}1"]) for n in ("batch", "dim2", "heads")),
        helper.make_node("Concat", ["batch1", "minus", "heads1", "dim21"], ["target"], axis=0),
        helper.make_node("Reshape", ["x", "target"], ["split"]),
        helper.make_node("Transpose", ["split"], ["turned"], perm=[0, 2, 1, 3]),
        helper.make_node("Cast", ["dim2"], ["dimf"], to=TensorProto.FLOAT),
        helper.make_node("Sqrt", ["dimf"], ["root"]),
        helper.make_node("Div", ["turned", "root"], ["scaled"]),
        helper.make_node("Concat", ["batch1", "one", "one"], ["wide"], axis=0),
        helper.make_node("ConstantOfShape", ["three"], ["ones"], value=numpy_helper.from_array(ints(1))),
        helper.make_node("Mul", ["ones", "minus"], ["keep"]),
        helper.make_node("Equal", ["wide", "keep"], ["same"]),
        helper.make_node("Where", ["same", "ones", "wide"], ["full"]),
        helper.make_node("Expand", ["token", "full"], ["tokens"]),
        helper.make_node("Range", ["zero", "two", "step"], ["order"]),
        helper.make_node("Gather", ["scaled", "order"], ["picked"], axis=1),
        helper.make_node("Flatten", ["picked"], ["flat"]),
        helper.make_node("ReduceSum", ["tokens"], ["y2"], keepdims=0),
        helper.make_node("ReduceMean", ["flat"], ["y"], keepdims=1, axes=[1]),
    ]
    constants = {
        "zero": np.array(0), "two": np.array(2), "heads": np.array(2), "step": np.array(1), "axis": ints(0),
        "minus": ints(-1), "one": ints(1), "three": ints(3), "token": floats(1, 1, 4),
    }  # fmt: skip
    return nodes, constants


def test_shapes_are_computed_on_the_host_with_a_symbolic_batch() -> None:
    """Shape arithmetic leaves no trace in the exported program, and the batch stays dynamic."""
    nodes, constants = shape_arithmetic()
    model = model_of(nodes, ("n", 3, 8), constants, 13, outputs=("y", "y2"))
    agrees(model, floats(2, 3, 8))
    program = torch.export.export(build(model), (torch.randn(2, 3, 8),), dynamic_shapes=({0: Dim("batch")},))
    x = floats(5, 3, 8)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    np.testing.assert_allclose(
        program.module()(torch.from_numpy(x))["y"].numpy(),
        session.run(["y"], {"x": x})[0],
        rtol=1e-5,
        atol=1e-6,
    )
    assert not [n for n in program.graph.nodes if "arange" in str(n.target) or "gather" in str(n.target)]


def test_ranges_and_repeats_of_the_batch_stay_open() -> None:
    """Range, Tile and Expand by the batch size are tensors of that length, not those of the example."""
    nodes = [
        helper.make_node("Shape", ["x"], ["batch"], end=1),
        helper.make_node("Squeeze", ["batch", "axis"], ["count"]),
        helper.make_node("Range", ["zero", "count", "one"], ["rows"]),
        helper.make_node("Gather", ["x", "rows"], ["same"], axis=0),
        helper.make_node("Concat", ["batch", "three"], ["shape"], axis=0),
        helper.make_node("Expand", ["half", "shape"], ["halves"]),
        helper.make_node("Tile", ["half1", "batch"], ["column"]),
        helper.make_node("Unsqueeze", ["column", "minus"], ["columns"]),
        helper.make_node("Add", ["same", "halves"], ["sum"]),
        helper.make_node("Mul", ["sum", "columns"], ["y"]),
    ]
    constants = {
        "axis": ints(0), "minus": ints(-1), "zero": np.array(0), "one": np.array(1), "three": ints(3),
        "half": np.float32(0.5), "half1": np.array([0.5], np.float32),
    }  # fmt: skip
    model = model_of(nodes, ("n", 3), {k: np.asarray(v) for k, v in constants.items()})
    agrees(model, floats(4, 3))
    program = torch.export.export(build(model), (torch.randn(2, 3),), dynamic_shapes=({0: Dim("batch")},))
    x = torch.randn(5, 3)
    assert torch.allclose(program.module()(x), (x + 0.5) * 0.5)


def test_matmul_and_gemm_become_named_linears() -> None:
    """MatMul + Add with constants and Gemm are nn.Linear under the names their weights or nodes had."""
    nodes = [
        helper.make_node("Transpose", ["blocks.0.fc.weight"], ["wt"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "wt"], ["a"]),
        helper.make_node("Add", ["bias1", "a"], ["b"]),
        helper.make_node("MatMul", ["b", "onnx::MatMul_7"], ["c"], name="/blocks/blocks.1/mlp/fc2/MatMul"),
        helper.make_node("Gemm", ["c", "head.weight", "head.bias"], ["y"], transB=1),
    ]
    constants = {
        "blocks.0.fc.weight": floats(6, 4), "bias1": floats(6), "onnx::MatMul_7": floats(6, 5),
        "head.weight": floats(3, 5), "head.bias": floats(3),
    }  # fmt: skip
    model = model_of(nodes, ("n", 4), constants)
    module = build(model)
    linears = {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear)}
    assert list(linears) == ["blocks.0.fc", "blocks.1.mlp.fc2", "head"]
    assert [m.bias is not None for m in linears.values()] == [True, False, True]
    assert sum(p.numel() for p in module.parameters()) == 24 + 6 + 30 + 15 + 3
    agrees(model, floats(2, 4))


@pytest.mark.parametrize(
    ("weight", "label", "scope", "path"),
    [
        ("blocks.0.attn.qkv.weight", "MatMul n", "", "blocks.0.attn.qkv"),
        ("val_3", "MatMul node_1", "['', 'blocks.2', 'blocks.2.attn', 'linear_4']", "blocks.2.attn"),
        ("onnx::MatMul_3", "MatMul /layer/layer.0/fc/MatMul", "", "layer.0.fc"),
        ("w", "Gemm gemm:7", "not a list", "gemm.7"),
    ],
)
def test_layers_are_named_like_the_source(weight: str, label: str, scope: str, path: str) -> None:
    """The weight's name, else the exporter's scopes, else the node's name."""
    assert layer_path(weight, Step("MatMul", label, (), (), scope=scope)) == path
    assert clean("/a/b:c.d") == "a.b.c.d"


class Exported(nn.Module):
    """Runs a family's module; torch.onnx keeps its parameter names."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def exported(family: str, path: Path, opset: int) -> nn.Module:
    module = FAMILIES[family].load().module
    size = FAMILIES[family].load().image_size
    with torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.MATH]):
        torch.onnx.export(
            module, (images(size),), path, opset_version=opset, dynamo=True,
            dynamic_shapes=({0: Dim("batch")},), verbose=False, input_names=["images"],
        )  # fmt: skip
    return module


_ROUND_TRIPS = [("timm vit", 18)]
_SLOW_TRIPS = [
    ("timm swinv2", 20),
    ("hf pvt", 23),
    ("timm beit", 20),
    ("timm eva02", 18),
    ("hf swin", 20),
    ("user module", 23),
]


@pytest.mark.parametrize(
    ("family", "opset"),
    [*_ROUND_TRIPS, *(pytest.param(f, o, marks=pytest.mark.slow) for f, o in _SLOW_TRIPS)],
)
def test_a_whole_model_survives_the_round_trip(family: str, opset: int, tmp_path: Path) -> None:
    """A model exported to ONNX and loaded again computes the same, for any batch, with named linears."""
    path = tmp_path / "model.onnx"
    source_module = exported(family, path, opset)
    model = load(str(path))
    assert model.baseline_path == path
    assert model.image_size == FAMILIES[family].load().image_size
    assert any("from ONNX Runtime on the file" in note for note in model.notes)
    batch = images(model.image_size, batch=3)
    with torch.no_grad():
        reference = source_module(batch)
        assert torch.allclose(model.module(batch), reference, atol=1e-5)
        program = torch.export.export(
            model.module, (images(model.image_size),), dynamic_shapes=({0: Dim("b")},)
        )
        assert torch.allclose(program.module()(batch), reference, atol=1e-5)
    linears = [n for n, m in source_module.named_modules() if isinstance(m, nn.Linear) and "cpb" not in n]
    found = [n for n, m in model.module.named_modules() if isinstance(m, nn.Linear)]
    assert len(found) >= len(linears)  # nn.MultiheadAttention's joint projection is one here
    with pytest.raises(BadSize, match="has no other size"):
        adapt(model, (model.image_size[0] * 2, model.image_size[1]))


def saved(model: onnx.ModelProto, path: Path) -> str:
    for value, shape in ((model.graph.output[0], ("n", 3)),):
        value.CopyFrom(helper.make_tensor_value_info(value.name, TensorProto.FLOAT, shape))
    onnx.save(model, path)
    return str(path)


def tiny(opset: int = 17, op: str = "Relu", domain: str = "") -> onnx.ModelProto:
    nodes = [
        helper.make_node("GlobalAveragePool", ["x"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node(op, ["f"], ["y"], name="last", domain=domain),
    ]
    model = model_of(nodes, ("n", 3, 16, 16), opset=opset)
    if domain:
        model.opset_import.append(helper.make_opsetid(domain, 1))
    return model


def test_an_unknown_operator_is_named(tmp_path: Path) -> None:
    """An operator that cannot be imported is named with its node and domain."""
    with pytest.raises(UnsupportedOperator, match=r"com\.example\.Magic last cannot be imported"):
        build(tiny(op="Magic", domain="com.example"))
    with pytest.raises(UnsupportedOperator, match="Det last cannot be imported"):
        build(tiny(op="Det"))
    quantized = UnsupportedOperator
    with pytest.raises(quantized, match="the file is already quantised"):
        build(tiny(op="DynamicQuantizeLinear"))


@pytest.mark.parametrize(
    ("op", "shape", "others", "attributes", "says"),
    [
        (
            "Resize",
            (2, 3, 4, 6),
            [None, None, ints(2, 3, 7, 5)],
            {"antialias": 1, "mode": "cubic"},
            "resizing by",
        ),
        ("Pad", (2, 3), [ints(0, 1, 0, 1)], {"mode": "reflect"}, "padding mode reflect"),
        ("MaxPool", (2, 3, 8, 8), [], {"kernel_shape": [3, 3], "auto_pad": "SAME_UPPER"}, "pooling"),
        ("CumSum", (2, 3), [np.array(1)], {"reverse": 1}, "reverse"),
        ("ScatterND", (4, 3), [np.array([[0]]), floats(1, 3)], {"reduction": "add"}, "reduction"),
        ("GatherND", (2, 3, 4), [np.array([[0], [1]])], {"batch_dims": 1}, "batch dimensions"),
        ("Cast", (2, 3), [], {"to": TensorProto.STRING}, "element type 8"),
    ],
)
def test_what_an_operator_cannot_do_is_named(
    op: str, shape: tuple[int, ...], others: list[Any], attributes: dict[str, Any], says: str
) -> None:
    """A variant that is not imported is refused with operator and reason, never computed otherwise."""
    constants = {f"c{i}": np.asarray(v) for i, v in enumerate(others) if v is not None}
    names = ["x", *(f"c{i}" if v is not None else "" for i, v in enumerate(others))]
    node = helper.make_node(op, names, ["y"], name="odd", **attributes)
    with pytest.raises(UnsupportedOperator, match=f"{op} odd cannot be imported: .*{says}"):
        build(model_of([node], shape, constants, 18))(torch.randn(shape))


@pytest.mark.parametrize("opset", [10, 24])
def test_opsets_outside_the_range_are_refused(opset: int, tmp_path: Path) -> None:
    """Opset 11 to 23; the message says so."""
    with pytest.raises(InputError, match=f"has opset {opset}; 11 to 23"):
        load(saved(tiny(opset), tmp_path / "m.onnx"))


def test_a_file_that_takes_no_image_is_refused(tmp_path: Path) -> None:
    """Two inputs, or one of another shape, are listed."""
    model = tiny()
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 16, 16, 3)))
    with pytest.raises(InputError, match=r"must take one float32 image .* it takes x \[1, 16, 16, 3\]"):
        load(saved(model, tmp_path / "nhwc.onnx"))


def test_a_broken_file_is_one_clear_line(tmp_path: Path) -> None:
    """A file that is no ONNX, and options that make no sense for one."""
    path = tmp_path / "bad.onnx"
    path.write_bytes(b"\x00\x01 not onnx")
    with pytest.raises(InputError, match="is not a valid ONNX file"):
        load(str(path))
    with pytest.raises(UsageError, match="brings its own weights"):
        load(saved(tiny(), tmp_path / "m.onnx"), LoadOptions(num_classes=3))


def test_symbolic_sizes_are_assumed_and_said(tmp_path: Path) -> None:
    """Height and width left open in the file become 224 with a note."""
    model = tiny()
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, ("n", 3, "h", "w")))
    loaded = load(saved(model, tmp_path / "open.onnx"))
    assert loaded.image_size == (224, 224)
    assert any("symbolic in the file: 224x224" in note for note in loaded.notes)


def test_half_weights_are_computed_in_float32(tmp_path: Path) -> None:
    """A float32 graph with float16 constants behind casts loads as float32 parameters."""
    nodes = [
        helper.make_node("GlobalAveragePool", ["x"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Cast", ["w"], ["w32"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["f", "w32"], ["y"]),
    ]
    model = model_of(nodes, ("n", 3, 16, 16), {"w": floats(3, 3).astype(np.float16)})
    loaded = load(saved(model, tmp_path / "half.onnx"))
    assert {p.dtype for p in loaded.module.parameters()} == {torch.float32}


def test_a_wrong_import_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison with ONNX Runtime stops an import that computes something else."""
    path = saved(tiny(), tmp_path / "m.onnx")
    monkeypatch.setitem(OPS, "Relu", lambda call: call.tensor() + 1.0)  # type: ignore[arg-type]
    with pytest.raises(ParityError, match="was imported wrongly"):
        load(path)
    monkeypatch.setattr(source, "find_spec", lambda name: None)
    assert any("not compared" in note for note in load(path).notes)


def test_a_fixed_batch_is_kept(tmp_path: Path) -> None:
    """A file for batches of 4 is run with 4."""
    model = tiny()
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, (4, 3, 16, 16)))
    model.graph.node.insert(2, helper.make_node("Reshape", ["f", "shape"], ["r"]))
    model.graph.node[3].input[0] = "r"
    model.graph.initializer.append(numpy_helper.from_array(ints(4, 3), "shape"))
    assert load(saved(model, tmp_path / "four.onnx")).module(torch.zeros(4, 3, 16, 16)).shape == (4, 3)
