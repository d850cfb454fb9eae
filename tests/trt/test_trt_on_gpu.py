"""The real thing, where a GPU is: pytest -m gpu tests/trt. The same calls as over the fakes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from contracts.runner import RunnerContract
from contracts.trt_graphs import SIZE, linear_logits, save_linear
from vit_export.artifacts import Images, Runnable, Size
from vit_export.export.trt_build import build_engine
from vit_export.export.trt_manifest import GraphInput
from vit_export.export.trt_options import TensorRtOptions
from vit_export.runtime.runner import open_runner
from vit_export.runtime.tensorrt_runner import TensorRTRunner

pytestmark = pytest.mark.gpu


def engine(folder: Path, batch: int | None) -> Path:
    folder.mkdir(exist_ok=True)
    graph = save_linear(folder / "model.onnx", batch)
    built = build_engine(graph, GraphInput.of(graph), TensorRtOptions(batches=(1, 4, 8)))
    assert built.engine is not None, built.reason
    return built.engine


class TestTensorRTOnGpu(RunnerContract):
    sdk = None  # either package may serve; the fakes prove what a missing one says
    tolerance = 1e-3

    @pytest.fixture
    def runnable(self, tmp_path: Path) -> Runnable:
        return Runnable("tensorrt", engine(tmp_path / "free", None))

    @pytest.fixture
    def fixed(self, tmp_path: Path) -> Runnable:
        return Runnable("tensorrt", engine(tmp_path / "fixed", 2))

    @pytest.fixture
    def size(self) -> Size:
        return SIZE

    @pytest.fixture
    def expected(self):
        return linear_logits


def test_measure_and_facts(tmp_path):
    """GPU times are positive and below the host's, and the device names itself."""
    images: Images = np.random.default_rng(0).standard_normal((8, 3, *SIZE), dtype=np.float32)
    with open_runner(Runnable("tensorrt", engine(tmp_path, None))) as runner:
        assert isinstance(runner, TensorRTRunner)
        times, facts = runner.measure(images), runner.facts()
    assert 0 < times.compute.p50 < times.host.p50
    assert facts.device.name and facts.device.capability >= (7, 5)
    assert facts.memory_bytes >= 0
