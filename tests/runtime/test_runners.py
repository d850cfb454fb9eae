"""The runner contract for each runtime, and what only one of them does."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from contracts.runner import RunnerContract
from contracts.tiny import CLASSES, SIZE, Tiny, images
from vit_export.artifacts import Runnable
from vit_export.errors import RunnerError, UsageError
from vit_export.runtime.runner import RUNNERS, Runner, open_runner
from vit_export.runtime.worker_client import Worker


class TinyRunnerContract(RunnerContract):
    """The contract on files of the tiny model. `name` in RUNNERS, `suffix` of its files."""

    name: str
    suffix: str

    @pytest.fixture
    def runnable(self, tiny: Tiny) -> Runnable:
        return Runnable(self.name, tiny.path(self.suffix), threads=1)

    @pytest.fixture
    def fixed(self, tiny: Tiny) -> Runnable:
        return Runnable(self.name, tiny.path(self.suffix, batch=2), threads=1)

    @pytest.fixture
    def size(self):
        return SIZE

    @pytest.fixture
    def expected(self, tiny: Tiny):
        return tiny.logits


class TestTorchRunner(TinyRunnerContract):
    name, suffix, sdk = "pytorch", "pt2", "torch"


class TestOrtRunner(TinyRunnerContract):
    name, suffix, sdk = "onnx", "onnx", "onnxruntime"


class TestOpenVinoIr(TinyRunnerContract):
    name, suffix, sdk = "openvino", "xml", "openvino"


class TestOpenVinoOnnx(TinyRunnerContract):
    name, suffix, sdk = "openvino", "onnx", "openvino"


class TestFakeRunner(RunnerContract):
    sdk, reads_file = None, False

    @pytest.fixture
    def runnable(self) -> Runnable:
        return Runnable("fake", Path("fake"), options={"image_size": SIZE, "classes": CLASSES})

    @pytest.fixture
    def fixed(self, runnable: Runnable) -> Runnable:
        return replace(runnable, options={**runnable.options, "batch": 2})

    @pytest.fixture
    def size(self):
        return SIZE

    @pytest.fixture
    def expected(self, runnable: Runnable):
        return lambda batch: open_runner(runnable).__enter__().infer(batch)


@pytest.mark.parametrize("name", RUNNERS)
def test_every_runner_in_the_table_exists(name: str):
    """Each line of RUNNERS names a Runner that says which package and extra it needs."""
    module, _, attribute = RUNNERS[name].partition(":")
    kind = getattr(importlib.import_module(module), attribute)
    assert issubclass(kind, Runner)
    assert kind.package
    assert kind.extra


def test_unknown_runner_lists_the_known():
    """A misspelt runner is a usage error with the choices."""
    with pytest.raises(UsageError, match="onnx, openvino"):
        open_runner(Runnable("onxx", Path("m")))


@pytest.mark.parametrize(
    ("runner", "suffix", "options"),
    [
        ("onnx", "onnx", {"optimization": "none"}),
        ("onnx", "onnx", {"spinning": False}),
        ("openvino", "xml", {"hint": "THROUGHPUT"}),
        ("openvino", "xml", {"inference_precision": None}),
        ("openvino", "onnx", {"inference_precision": "bf16"}),
    ],
)
def test_options_change_speed_not_the_answer(tiny: Tiny, runner: str, suffix: str, options: dict[str, Any]):
    """Each documented option is taken, and outputs stay within what bfloat16 can lose."""
    batch = images(3)
    with open_runner(Runnable(runner, tiny.path(suffix), 1, options)) as opened:
        np.testing.assert_allclose(opened.infer(batch), tiny.logits(batch), atol=0.05)


@pytest.mark.parametrize(
    ("runner", "suffix", "options"),
    [
        ("onnx", "onnx", {"optimization": "most"}),
        ("openvino", "xml", {"hint": 3}),
        ("pytorch", "pt2", {"x": 1}),
    ],
)
def test_bad_options_are_usage_errors(tiny: Tiny, runner: str, suffix: str, options: dict[str, Any]):
    """A value outside an option's choices, of another type, or an option that does not exist is refused."""
    with pytest.raises(UsageError, match=runner):
        open_runner(Runnable(runner, tiny.path(suffix), 1, options)).__enter__()


def test_openvino_compiles_one_static_shape_a_batch(tiny: Tiny):
    """Latency at batch 1 is that of a static model, and each batch is compiled once."""
    with open_runner(Runnable("openvino", tiny.path("xml"), 1)) as runner:
        for count in (3, 1, 3):
            runner.infer(images(count))
        shapes = {n: str(r.model_inputs[0].partial_shape) for n, r in runner._requests.items()}
    assert shapes == {1: "[1,3,16,24]", 3: "[3,3,16,24]"}


def test_torch_uses_the_threads_it_is_given(tiny: Tiny):
    """threads reaches torch; 0 leaves torch's own choice."""
    before = torch.get_num_threads()
    try:
        with open_runner(Runnable("pytorch", tiny.path("pt2"), before + 1)):
            assert torch.get_num_threads() == before + 1
        with open_runner(Runnable("pytorch", tiny.path("pt2"), 0)):
            assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


class Quantized(torch.nn.Module):
    """Quantise, dequantise and pool: [N, 3, 16, 24] to [N, 3]."""

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        limits = (0.1, 0, -128, 127, torch.int8)
        ops = torch.ops.quantized_decomposed
        whole = ops.quantize_per_tensor(pictures, *limits)
        pooled: torch.Tensor = ops.dequantize_per_tensor(whole, *limits).mean(dim=(2, 3))
        return pooled


def test_a_fresh_worker_opens_quantised_programs(tmp_path: Path):
    """A .pt2 with Q/DQ opens where nothing has registered these operators before."""
    importlib.import_module("torch.ao.quantization.fx._decomposed")
    program = torch.export.export(Quantized(), (torch.zeros(1, 3, *SIZE),))
    torch.export.save(program, tmp_path / "q.pt2")
    with Worker(Runnable("pytorch", tmp_path / "q.pt2", 1), timeout=120) as worker:
        assert len(worker.time(warmup=0, runs=2)) == 2


def graph(shape: list[object], kind: int = onnx.TensorProto.FLOAT, inputs: int = 1) -> onnx.ModelProto:
    """An ONNX model that flattens its input of this shape, with more inputs of the same kind besides."""
    helper = onnx.helper
    takes = [helper.make_tensor_value_info(f"x{n}", kind, shape) for n in range(inputs)]
    nodes = [helper.make_node("Flatten", ["x0"], ["y0"])]
    nodes += [helper.make_node("Add", ["x0", f"x{n}"], [f"z{n}"]) for n in range(1, inputs)]
    gives = [helper.make_tensor_value_info("y0", kind, [None, None])]
    gives += [helper.make_tensor_value_info(f"z{n}", kind, shape) for n in range(1, inputs)]
    opset = [helper.make_opsetid("", 20)]
    return helper.make_model(helper.make_graph(nodes, "g", takes, gives), opset_imports=opset, ir_version=10)


@pytest.mark.parametrize("runner", ["onnx", "openvino"])
@pytest.mark.parametrize(
    "model",
    [
        graph(["n", 3, "h", "w"]),
        graph([1, 3, 8]),
        graph([1, 3, 8, 8], onnx.TensorProto.FLOAT16),
        graph([1, 3, 8, 8], inputs=2),
    ],
    ids=["free-size", "rank-3", "float16", "two-inputs"],
)
def test_models_of_another_kind_are_refused(tmp_path: Path, runner: str, model: onnx.ModelProto):
    """A model without one float32 [N, 3, H, W] input of fixed size is refused on opening."""
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(RunnerError, match="input"):
        open_runner(Runnable(runner, tmp_path / "m.onnx", 1)).__enter__()


@pytest.mark.parametrize("runner", ["onnx", "openvino"])
def test_output_is_chosen_by_name(tmp_path: Path, runner: str):
    """A model with several outputs gives the one asked for; a name it lacks is refused."""
    model = graph([2, 3, 8, 8])
    model.graph.node.append(onnx.helper.make_node("Neg", ["y0"], ["other"]))
    model.graph.output.append(onnx.helper.make_tensor_value_info("other", onnx.TensorProto.FLOAT, [2, None]))
    onnx.save(model, tmp_path / "m.onnx")
    batch = np.ones((2, 3, 8, 8), np.float32)
    with open_runner(Runnable(runner, tmp_path / "m.onnx", 1)) as opened:
        assert (opened.infer(batch) == 1).all()
    with open_runner(Runnable(runner, tmp_path / "m.onnx", 1, {"output": "other"})) as opened:
        assert (opened.infer(batch) == -1).all()
    with pytest.raises(RunnerError, match="absent"):
        open_runner(Runnable(runner, tmp_path / "m.onnx", 1, {"output": "absent"})).__enter__()
