"""The runner contract for each runtime, and what only one of them does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from contracts.runner import RunnerContract
from contracts.tiny import CLASSES, SIZE, Tiny
from vit_export.artifacts import Runnable
from vit_export.runtime.runner import open_runner


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
