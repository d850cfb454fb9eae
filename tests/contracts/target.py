"""What every target must do; subclass it, set `name`, and its tests run for that target."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from contracts.small import small_vit
from vit_export.artifacts import BuildRequest, BuiltArtifact, Precision, Program, QuantPlan, Runnable
from vit_export.calibration.collect import calibrate
from vit_export.calibration.observers import MinMaxConfig
from vit_export.calibration.plan import plan
from vit_export.errors import MissingExtra, UsageError
from vit_export.export.program import trace
from vit_export.export.quantize import quantize
from vit_export.export.target import Target
from vit_export.export.targets import target_named
from vit_export.runtime.runner import open_runner

IMAGES = np.random.default_rng(7).standard_normal((5, 3, 32, 32)).astype(np.float32)


class TargetContract:
    """name: in TARGETS. options: for its builds. floor: SQNR in dB that each precision must reach."""

    name: ClassVar[str]
    options: ClassVar[dict[str, object]] = {}
    floor: ClassVar[dict[Precision, float]] = {Precision.FP32: 80, Precision.FP16: 50, Precision.INT8: 25}

    @pytest.fixture(scope="class")
    def target(self) -> Target:
        """The target under test."""
        return target_named(self.name)

    @pytest.fixture(scope="class")
    def program(self) -> Program:
        """A small traced ViT."""
        return trace(small_vit())

    @pytest.fixture(scope="class")
    def plain(self, program: Program) -> QuantPlan:
        """Min-max ranges of noise like IMAGES."""
        images = np.random.default_rng(3).standard_normal((16, 3, 32, 32)).astype(np.float32)
        return plan(calibrate(program, [images], MinMaxConfig()), program.layers)

    def build(
        self,
        target: Target,
        program: Program,
        plain: QuantPlan,
        precision: Precision,
        folder: Path,
        **more: object,
    ) -> BuiltArtifact:
        """The artifact of one precision in `folder`."""
        request = BuildRequest(
            precision=precision,
            folder=folder,
            preprocessing=small_vit().preprocessing,
            metadata={"model": "small-vit"},
            options=self.options,
            **more,  # type: ignore[arg-type]
        )
        if precision is Precision.INT8:
            program = quantize(program, plain, target.profile(precision, self.options))
        return target.build(program, request)

    @pytest.fixture(scope="class")
    def built(
        self, target: Target, program: Program, plain: QuantPlan, tmp_path_factory: pytest.TempPathFactory
    ) -> Callable[[Precision], BuiltArtifact]:
        """The artifact of a precision, built once for all tests that only read it."""

        @functools.cache
        def artifact(precision: Precision) -> BuiltArtifact:
            folder = tmp_path_factory.mktemp(f"{self.name}-{precision}")
            return self.build(target, program, plain, precision, folder)

        return artifact

    def runnable(self, target: Target, artifact: BuiltArtifact) -> Runnable:
        """How the contract runs an artifact here."""
        return target.runnable(artifact, 1)

    @pytest.mark.parametrize("precision", list(Precision))
    def test_artifact_computes_what_the_program_does(
        self,
        target: Target,
        program: Program,
        built: Callable[[Precision], BuiltArtifact],
        precision: Precision,
    ) -> None:
        """Outputs of the built file are within the precision's noise of PyTorch."""
        artifact = built(precision)
        with torch.inference_mode():
            reference = program.graph(torch.from_numpy(IMAGES)).numpy()
        with open_runner(self.runnable(target, artifact)) as runner:
            logits = runner.infer(IMAGES)
        noise = np.square(reference - logits).sum()
        assert 10 * np.log10(np.square(reference).sum() / max(noise, 1e-30)) > self.floor[precision]

    def test_artifact_describes_itself(self, built: Callable[[Precision], BuiltArtifact]) -> None:
        """Path, size, precision and image size are those of the file that was written."""
        artifact = built(Precision.FP32)
        assert artifact.path.exists() and artifact.path.is_absolute()
        assert artifact.size_bytes > 4 * 40_000 and artifact.image_size == (32, 32)
        assert artifact.target == self.name and artifact.precision is Precision.FP32

    def test_fixed_batch_is_fixed(
        self, target: Target, program: Program, plain: QuantPlan, tmp_path: Path
    ) -> None:
        """A batch size asked for is the one the runner reports."""
        artifact = self.build(target, program, plain, Precision.FP32, tmp_path, batch_size=5)
        with open_runner(self.runnable(target, artifact)) as runner:
            assert runner.signature.batch == 5
            assert runner.infer(IMAGES).shape == (5, 10)

    def test_missing_sdk_is_one_line(
        self,
        target: Target,
        program: Program,
        plain: QuantPlan,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Without its package the target says which extra to install."""
        monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
        with pytest.raises(MissingExtra, match=r"pip install 'vit-export\["):
            self.build(target, program, plain, Precision.FP32, tmp_path)

    def test_unknown_precision_is_refused(
        self,
        target: Target,
        program: Program,
        plain: QuantPlan,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A precision the target does not have is a usage error, before anything is built."""
        monkeypatch.setattr(type(target), "precisions", (Precision.FP32,))
        with pytest.raises(UsageError, match="has no fp16 precision"):
            self.build(target, program, plain, Precision.FP16, tmp_path / "never")
        assert not (tmp_path / "never").exists()
