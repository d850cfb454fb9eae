"""Functions, images, classifiers and refusals of the reference interpreter."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb
from coremltools.proto import Model_pb2
from torch import nn

from vit_export.errors import InputError, RunnerError, UnsupportedOperator
from vit_export.runtime.coreml_interpreter import Interpreter
from vit_export.runtime.mil_program import Feature

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (8, 12, 3), dtype=np.uint8)
LABELS = ["zebra", "ant", "moth", "bee", "cat"]


class Net(nn.Module):
    """A tiny classifier of 8x12 RGB images."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 6, 4, 4), nn.GELU(), nn.Flatten(), nn.Linear(36, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [N, 3, 8, 12] to [N, 5]."""
        return self.body(x)


@cache
def traced() -> Any:
    return torch.export.export(Net().eval(), (torch.zeros(1, 3, 8, 12),)).run_decompositions({})


def scaled(factor: float) -> Any:
    """y = factor * identity(x) for x [1, 64], with a weight."""

    @mb.program(input_specs=[mb.TensorSpec((1, 64))], opset_version=ct.target.iOS18)
    def build(x: Any) -> Any:
        return mb.mul(x=mb.linear(x=x, weight=np.eye(64, dtype=np.float32)), y=factor, name="y")

    return build


def reference(images: Any) -> Any:
    with torch.inference_mode():
        return Net().eval()(torch.from_numpy(np.asarray(images, np.float32))).numpy()


def edit(package: Path, change: Any) -> Any:
    """Apply `change` to the operations of the first function and write the model back."""
    file = package / "Data/com.apple.CoreML/model.mlmodel"
    model = Model_pb2.Model.FromString(file.read_bytes())
    function = next(iter(model.mlProgram.functions.values()))
    change(function.block_specializations[function.opset].operations)
    file.write_bytes(model.SerializeToString())
    return package


@pytest.fixture
def tensor_package(save: Any) -> Path:
    path: Path = save(traced(), inputs=[ct.TensorType("x", (1, 3, 8, 12))], outputs=[ct.TensorType("y")])
    return path


@pytest.mark.parametrize("layout", ["RGB", "BGR"])
def test_image_input(layout: str, save: Any) -> None:
    """uint8 RGB pixels reach the program in its channel order, through its own scale and bias."""
    image = ct.ImageType(
        "photo", (1, 3, 8, 12), scale=1 / 50, bias=[-1.0, 0.5, 2.0],
        color_layout=getattr(ct.colorlayout, layout),
    )  # fmt: skip
    interpreter = Interpreter(save(traced(), inputs=[image], outputs=[ct.TensorType("y")]))
    assert [feature.colors for feature in interpreter.inputs] == [layout]
    channels = PIXELS if layout == "RGB" else PIXELS[..., ::-1]
    expected = reference((channels / 50 + [-1.0, 0.5, 2.0]).transpose(2, 0, 1)[None])
    for given in (PIXELS, PIXELS[None]):
        np.testing.assert_allclose(interpreter.predict({"photo": given})["y"], expected, rtol=1e-4, atol=1e-5)


def test_classifier(save: Any) -> None:
    """A classifier gives the best label and every label's probability, in the order of the labels."""
    x = RNG.standard_normal((1, 3, 8, 12)).astype(np.float32)
    package = save(
        traced(), inputs=[ct.TensorType("x", x.shape)], classifier_config=ct.ClassifierConfig(LABELS)
    )
    interpreter = Interpreter(package)
    outputs = interpreter.predict({"x": x})
    expected = reference(x)[0]
    assert interpreter.outputs[0] == "classLabel"
    assert outputs["classLabel"] == LABELS[int(expected.argmax())]
    scores = outputs[interpreter.outputs[1]]
    assert list(scores) == LABELS
    np.testing.assert_allclose(list(scores.values()), expected, rtol=1e-4, atol=1e-5)


def test_classifier_with_numbers_for_labels(save: Any) -> None:
    """Integer labels come back as Python integers."""
    x = RNG.standard_normal((1, 3, 8, 12)).astype(np.float32)
    config = ct.ClassifierConfig([10, 20, 30, 40, 50])
    package = save(traced(), inputs=[ct.TensorType("x", x.shape)], classifier_config=config)
    outputs = Interpreter(package).predict({"x": x})
    assert outputs["classLabel"] == 10 * (int(reference(x).argmax()) + 1)


def test_multifunction(save: Any, tmp_path: Path) -> None:
    """Functions of one package are chosen by name, the stated default otherwise; weights are shared."""
    descriptor = ct.utils.MultiFunctionDescriptor()
    for name, factor in (("double", 2.0), ("triple", 3.0)):
        descriptor.add_function(str(save(scaled(factor), name)), "main", name)
    descriptor.default_function_name = "triple"
    path = tmp_path / "both.mlpackage"
    ct.utils.save_multifunction(descriptor, str(path))
    x = {"x": np.arange(64, dtype=np.float32)[None]}
    assert Interpreter(path).function_names == ("triple", "double")
    np.testing.assert_array_equal(Interpreter(path).predict(x)["y"], 3 * x["x"])
    np.testing.assert_array_equal(Interpreter(path, "double").predict(x)["y"], 2 * x["x"])
    with pytest.raises(InputError, match=r"no function 'half'[\s\S]*triple, double"):
        Interpreter(path, "half")


@pytest.mark.parametrize(("precision", "tolerance"), [("FLOAT32", 1e-6), ("FLOAT16", 5e-3)])
@pytest.mark.parametrize("target", ["iOS17", "iOS18"])
def test_float_packages(target: str, precision: str, tolerance: float, save: Any) -> None:
    """A converted torch.export program gives PyTorch's numbers, in fp16 within its rounding."""
    x = RNG.standard_normal((1, 3, 8, 12)).astype(np.float32)
    package = save(
        traced(), precision=precision, minimum_deployment_target=getattr(ct.target, target),
        inputs=[ct.TensorType("x", x.shape, dtype=np.float32)],
        outputs=[ct.TensorType("y", dtype=np.float32)],
    )  # fmt: skip
    result, expected = Interpreter(package).predict({"x": x})["y"], reference(x)
    assert result.dtype == np.float32
    assert np.abs(result - expected).max() < tolerance * np.abs(expected).max()
    if precision == "FLOAT16":
        assert (result != expected).any(), "fp16 rounding left no trace"


def test_fp16_interface(save: Any) -> None:
    """A package that declares fp16 input and output takes and returns float16."""
    x = RNG.standard_normal((1, 3, 8, 12)).astype(np.float16)
    package = save(
        traced(), precision="FLOAT16", inputs=[ct.TensorType("x", x.shape, dtype=np.float16)],
        outputs=[ct.TensorType("y", dtype=np.float16)],
    )  # fmt: skip
    result = Interpreter(package).predict({"x": x})["y"]
    assert result.dtype == np.float16
    np.testing.assert_allclose(result, reference(x), rtol=0.02, atol=5e-3)


def test_unknown_operation_is_named(tensor_package: Path) -> None:
    """An operation without a kernel stops the load, with its name and what it writes."""

    def rename(operations: Any) -> None:
        next(op for op in operations if op.type == "gelu").type = "crop_resize"

    with pytest.raises(UnsupportedOperator, match=r"no operation crop_resize \(it writes gelu"):
        Interpreter(edit(tensor_package, rename))


def test_unknown_parameter_is_named(tensor_package: Path) -> None:
    """A parameter that a kernel does not have is never ignored."""

    def add(operations: Any) -> None:
        conv = next(op for op in operations if op.type == "conv")
        conv.inputs["twist"].CopyFrom(conv.inputs["bias"])

    with pytest.raises(UnsupportedOperator, match="does not know twist of conv"):
        Interpreter(edit(tensor_package, add))


def test_declared_shape_is_binding(tensor_package: Path) -> None:
    """A result that contradicts the program's own type is an error, not an answer."""

    def lie(operations: Any) -> None:
        conv = next(op for op in operations if op.type == "conv")
        conv.outputs[0].type.tensorType.dimensions[1].constant.size = 7

    with pytest.raises(RunnerError, match=r"conv gave \[1, 6, 2, 3\].*declared \[1, 7, 2, 3\]"):
        Interpreter(edit(tensor_package, lie)).predict({"x": np.zeros((1, 3, 8, 12), np.float32)})


def test_features_that_do_not_fit(tensor_package: Path, save: Any) -> None:
    """Names, types and shapes of inputs are checked against the package."""
    interpreter = Interpreter(tensor_package)
    for features, words in (
        ({"y": np.zeros((1, 3, 8, 12), np.float32)}, "takes the inputs x, not y"),
        ({}, "takes the inputs x"),
        ({"x": np.zeros((1, 3, 8, 12))}, "FLOAT32, not float64"),
        ({"x": np.zeros((2, 3, 8, 12), np.float32)}, r"\[1, 3, 8, 12\], not \(2, 3, 8, 12\)"),
        ({"x": np.zeros((3, 8, 12), np.float32)}, "not"),
    ):
        with pytest.raises(InputError, match=words):
            interpreter.predict(features)
    image = ct.ImageType("x", (1, 3, 8, 12))
    interpreter = Interpreter(save(traced(), "image", inputs=[image]))
    for given in (PIXELS.astype(np.float32), PIXELS[..., :1], PIXELS[:4]):
        with pytest.raises(InputError, match="input x is"):
            interpreter.predict({"x": given})


def test_grey_image_input_is_refused(save: Any) -> None:
    """An image that has no RGB channels is an UnsupportedOperator, not a guess."""

    @mb.program(input_specs=[mb.TensorSpec((1, 1, 8, 12))], opset_version=ct.target.iOS18)
    def grey(x: Any) -> Any:
        return mb.relu(x=x, name="y")

    image = ct.ImageType("x", (1, 1, 8, 12), color_layout=ct.colorlayout.GRAYSCALE)
    with pytest.raises(UnsupportedOperator, match="neither RGB nor BGR"):
        Interpreter(save(grey, inputs=[image]))


def test_intermediate_values_are_freed(tensor_package: Path) -> None:
    """Running holds no value past its last use, and a second run gives the same bits."""
    interpreter = Interpreter(tensor_package)
    x = {"x": RNG.standard_normal((1, 3, 8, 12)).astype(np.float32)}
    finished = [name for names in interpreter._finished for name in names]
    assert len(finished) == len(set(finished)) > 3
    assert "y" not in finished
    np.testing.assert_array_equal(interpreter.predict(x)["y"], interpreter.predict(x)["y"])


def test_inputs_describe_themselves(tensor_package: Path) -> None:
    """Inputs carry name, declared type and shape, as a runner needs them."""
    (feature,) = Interpreter(tensor_package).inputs
    assert isinstance(feature, Feature)
    assert (feature.name, feature.colors) == ("x", "")
    assert (feature.declared.dtype, feature.declared.shape) == ("FLOAT32", (1, 3, 8, 12))
