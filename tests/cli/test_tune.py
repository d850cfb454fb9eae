"""`--tune` and `--throughput` from the command line to the artifact and the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vit_export import tuning, tuning_choices
from vit_export.runtime import throughput
from vit_export.runtime.onnx_metadata import metadata
from vit_export.tuning_choices import Choice


def test_what_was_tuned_is_in_the_artifact_and_in_the_report(
    vit_export: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session option that wins is in the file's metadata, where runners read it; the report has the step
    with its effect, images a second, the share of the processor and the cost of every stage."""
    spinning = (Choice("spinning threads", "session", "spinning", (True, False)),)
    for module in (tuning, tuning_choices):
        monkeypatch.setattr(module, "CHOICES", {"onnx": spinning})
    monkeypatch.setattr(tuning, "FASTER", 0.0)  # whatever the machine says, it is taken
    monkeypatch.setattr(throughput, "BATCHES", (1, 2))
    monkeypatch.setattr(throughput, "SECONDS", 0.05)
    run = vit_export(
        "--int8", "--calib-method", "minmax", "--calib-size", 16, "--eval-size", 32, "--no-bundle",
        "--tune", "--throughput", "--output", tmp_path,
    )  # fmt: skip
    assert run.code == 0 and "Tuned on this machine" in run.out and "Images a second" in run.out
    report = json.loads((tmp_path / "report.json").read_text())
    (result,) = report["results"]
    (step,) = result["tuning"]
    assert step["option"] == "False" and step["taken"] and step["ratio"] > 0 and step["sqnr_db"] > 25
    assert json.loads(metadata(tmp_path / result["artifact"])["session"]) == {"spinning": False}
    assert {point["batch"] for point in result["throughput"]} == {1, 2}
    assert result["roofline"]["ceiling"] == "int8" and result["roofline"]["share"] > 0
    stages = [cost["stage"] for cost in report["costs"]]
    assert {"trace", "calibrate", "tune onnx int8", "build onnx int8", "evaluate onnx int8"} <= set(stages)
    assert all(cost["peak_rss_bytes"] is None or cost["peak_rss_bytes"] > 1e8 for cost in report["costs"])


def test_a_budget_without_tune_is_a_mistake(vit_export: Any) -> None:
    """--tune-budget alone would do nothing, so it is refused."""
    run = vit_export("--tune-budget", 1)
    assert run.code == 2 and "--tune" in run.err
