"""FP32 PyTorch dies or hangs while it is timed: that costs its latency and what is divided by it, no more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vit_export import one_size
from vit_export.runtime import gate, report_files
from vit_export.runtime.gate_rules import Rule, Rules
from vit_export.runtime.latency import Timings, alternate
from vit_export.runtime.report_schema import Report
from vit_export.runtime.timed import BASELINE

WORDS = "the fake worker running model.pt2 did not answer for 2 s"


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run's baseline is timed by a worker that hangs, the artifacts in one short round."""
    told: dict[str, Any] = {"rounds": 1, "warmup": 1, "runs": 2, "min_seconds": 0}

    def alternated(runnables: dict[str, Any], **_: Any) -> Timings:
        others = dict(runnables)
        options = {"image_size": (96, 96), "fault": "hang"}
        broken = {BASELINE: replace(others.pop(BASELINE), runner="fake", options=options)}
        failed = alternate(broken, **told, max_seconds=0, timeout=2.0).failed
        return Timings(alternate(others, **told).rounds, failed)

    monkeypatch.setattr(one_size, "alternate", alternated)


@pytest.mark.usefixtures("hanging")
def test_only_its_latency_is_lost(vit_export: Any, tmp_path: Path):
    """The run ends well, with every artifact, without a speed-up, and says why in all formats."""
    out = tmp_path / "o"
    run = vit_export("--target", "onnx", "--eval-size", 8, "--no-bundle", "--output", out)
    assert run.code == 0, run.err
    report = report_files.read(out)
    assert report.baseline.latency_ms is None and report.baseline.reason == WORDS
    assert report.baseline.top1 is not None and report.baseline.roofline is None
    (result,) = report.results
    assert result.status == "ok" and result.latency_ms is not None and result.roofline is not None
    assert result.speedup is None and result.verdict is not None
    assert (out / str(result.artifact)).is_file()
    assert "pytorch fp32 96x96 not timed" in run.out
    said = f"its latency and speed-ups against it are unknown: {WORDS}"
    pages = [(out / name).read_text() for name in ("report.md", "report.html")]
    assert all(said in " ".join(text.split()) for text in (run.out, *pages))
    _check_gate(report)


def _check_gate(report: Report):
    """A rule on the speed-up cannot be decided and says why; one on latency can."""
    rules = Rules(rule=(Rule(metric="speedup", min=1.2), Rule(metric="p50_ms", max=1e4)), inconclusive_exit=5)
    found = gate.gate(report, rules=rules)
    assert (found.outcome, found.exit_code) == ("inconclusive", 5)
    assert [check.outcome for check in found.checks] == ["inconclusive", "passed"]
    assert found.checks[0].reason == f"pytorch fp32 96x96 was not timed: {WORDS}"
    assert found.report.results[0].gates[0].reason == found.checks[0].reason
