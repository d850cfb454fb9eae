"""--tune: what is tried, what is taken, and that the budget and the accuracy hold it back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vit_export import tuning, tuning_choices
from vit_export.artifacts import BuiltArtifact, EvalSet, Precision, Preprocessing, Runnable
from vit_export.build_size import Tuned
from vit_export.job import ExportJob
from vit_export.runtime.runner import open_runner
from vit_export.tuning import Tuner
from vit_export.tuning_choices import Choice, open_choices

SIZE = (16, 16)
EVERY = tuple(Precision)


@dataclass
class FakeTarget:
    """A target whose artifacts the fake runner opens: build options decide its delay."""

    name: str = "onnx"

    def not_timed(self) -> str:
        return ""

    def runnable(self, artifact: BuiltArtifact, threads: int) -> Runnable:
        return Runnable("fake", artifact.path, 1, {"image_size": SIZE, **artifact.details})


@dataclass(frozen=True)
class FakeBuilder:
    """Counts builds. made: the options of each."""

    job: ExportJob = field(default_factory=ExportJob)
    targets: tuple[FakeTarget, ...] = (FakeTarget(),)
    tuned: Mapping[Any, Tuned] = field(default_factory=dict)
    made: list[Mapping[str, Any]] = field(default_factory=list)

    def make(self, target: FakeTarget, precision: Precision, folder: Path) -> BuiltArtifact:
        options = dict(self.tuned[target.name, precision].options)
        self.made.append(options)
        details = {"delay_ms": options.get("delay_ms", 8.0)}
        return BuiltArtifact(target.name, precision, SIZE, folder / "x", 1, details)


def tuner(tmp_path: Path, *choices: Choice, seconds: float = 600.0) -> tuple[Tuner, FakeBuilder]:
    """A tuner of the fake target with these choices."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, *SIZE, 3), dtype=np.uint8)
    np.save(tmp_path / "pixels.npy", pixels)
    images = EvalSet(tmp_path / "pixels.npy", Preprocessing(SIZE), 4)
    with open_runner(Runnable("fake", Path("-"), 1, {"image_size": SIZE})) as runner:
        reference = runner.infer(images.preprocessing.normalize(pixels))
    builder = FakeBuilder()
    made: Any = builder
    return Tuner(made, images, reference, tmp_path, seconds, lambda *step: None), builder


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Duels of a tenth of a second: the delays differ enough."""
    monkeypatch.setattr(tuning, "_SECONDS", 0.1)
    monkeypatch.setattr(tuning, "_RUNS", 3)


def chosen(monkeypatch: pytest.MonkeyPatch, found: Tuner, *choices: Choice) -> Tuned:
    """What it takes for the fp32 artifact."""
    table = {"onnx": choices}
    monkeypatch.setattr(tuning, "CHOICES", table)
    monkeypatch.setattr(tuning_choices, "CHOICES", table)
    return found.run()["onnx", Precision.FP32]


def test_the_faster_option_is_taken_and_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build option that halves the time is taken; a session option on top of it needs no build."""
    found, builder = tuner(tmp_path)
    said = chosen(
        monkeypatch,
        found,
        Choice("kernel", "build", "delay_ms", (8.0, 4.0)),
        Choice("threads", "session", "delay_ms", (None, 9.0)),
    )
    assert said.options == {"delay_ms": 4.0} and said.session == {}
    kernel, threads = said.steps
    assert kernel.taken and kernel.ratio is not None and 1.5 < kernel.ratio < 2.5
    assert not threads.taken and threads.note == "not faster"
    assert builder.made == [{}, {"delay_ms": 4.0}]


def test_an_option_that_answers_worse_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice as fast is not enough if the answers lose decibels."""
    found, _ = tuner(tmp_path)
    said = chosen(monkeypatch, found, Choice("sloppy", "session", "noise", (0.0, 0.5)))
    (step,) = said.steps
    assert not step.taken and step.note.startswith("loses") and said.session == {}


def test_a_failing_option_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An option that the runtime cannot run is a row with its reason, and the default stays."""
    found, _ = tuner(tmp_path)
    said = chosen(monkeypatch, found, Choice("broken", "session", "fault", ("none", "error")))
    assert not said.steps[0].taken and "told to fail" in said.steps[0].note


def test_the_budget_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without time left nothing is built or run, and each option says that it was not tried."""
    found, builder = tuner(tmp_path, seconds=-1.0)
    said = chosen(monkeypatch, found, Choice("kernel", "build", "delay_ms", (8.0, 4.0)))
    assert [step.note for step in said.steps] == ["not tried: out of budget"] and builder.made == []


def test_a_flag_closes_its_choice() -> None:
    """What the user named is not tuned; a choice of int8 is not offered to fp32."""
    names = {c.name for c in open_choices(ExportJob(), "onnx", Precision.INT8)}
    assert {"operators", "opset", "spinning threads"} <= names
    given = ExportJob(opset=20, options={"onnx_operators": "standard"})
    assert {c.name for c in open_choices(given, "onnx", Precision.INT8)} == names - {"operators", "opset"}
    assert "operators" not in {c.name for c in open_choices(ExportJob(), "onnx", Precision.FP32)}
    assert open_choices(ExportJob(), "coreml", Precision.INT8) == ()
