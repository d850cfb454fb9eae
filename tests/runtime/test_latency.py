"""Alternating timing: known delays give known ratios, and one failure stays one failure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vit_export.artifacts import EvalSet, Preprocessing, Runnable
from vit_export.errors import MissingExtra, WorkerCrash
from vit_export.runtime import latency
from vit_export.runtime.latency import Timings, alternate, summarize


def fake(**options: Any) -> Runnable:
    """A fake artifact that takes 16x16 images."""
    return Runnable("fake", Path("fake"), threads=1, options={"image_size": (16, 16), **options})


def test_known_delays_give_known_ratios(monkeypatch: pytest.MonkeyPatch):
    """Calls of 12 and 4 ms are measured as a ratio of 3, in turns A B A B."""
    monkeypatch.setattr(latency, "SETTLE_SECONDS", 0.0)
    turns: list[tuple[str, int, int]] = []
    timings = alternate(
        {"slow": fake(delay_ms=12), "fast": fake(delay_ms=4)},
        rounds=2, warmup=1, runs=8, min_seconds=0, progress=lambda *turn: turns.append(turn),
    )  # fmt: skip
    assert turns == [("slow", 1, 4), ("fast", 2, 4), ("slow", 3, 4), ("fast", 4, 4)]
    assert timings.median_ratio("slow", "fast") == pytest.approx(3.0, rel=0.15)
    assert all(ratio == pytest.approx(3.0, rel=0.25) for ratio in timings.round_ratios("slow", "fast"))
    assert timings.latency("slow").p50 == pytest.approx(12, rel=0.15)
    assert timings.latency("slow").runs == 16


def test_a_failing_runtime_does_not_disturb_the_others(monkeypatch: pytest.MonkeyPatch):
    """A crash in the second round and a missing SDK are kept with their names; the rest is measured."""
    monkeypatch.setattr(latency, "SETTLE_SECONDS", 0.0)
    timings = alternate(
        {
            "missing": fake(fault="missing", fault_at="open"),
            "fine": fake(),
            "crash": fake(delay_ms=20, fault="crash", fault_after=12),  # nine or ten calls a round
        },
        rounds=3, warmup=1, runs=3, min_seconds=0,
    )  # fmt: skip
    assert timings.latency("fine").runs == 9
    with pytest.raises(MissingExtra):
        timings.latency("missing")
    with pytest.raises(WorkerCrash):
        timings.median_ratio("fine", "crash")
    assert set(timings.failed) == {"missing", "crash"}


def test_time_limits_of_a_round(monkeypatch: pytest.MonkeyPatch):
    """A fast artifact fills the least time with more calls, a slow one stops at the most time."""
    monkeypatch.setattr(latency, "SETTLE_SECONDS", 0.0)
    timings = alternate(
        {"fast": fake(delay_ms=1), "slow": fake(delay_ms=100)},
        rounds=2, warmup=50, runs=10, min_seconds=0.2, max_seconds=0.6,
    )  # fmt: skip
    assert timings.latency("fast").runs > 40
    assert 2 <= timings.latency("slow").runs <= 8


def test_the_input_is_the_evaluation_images(tmp_path: Path):
    """Images of the set are used, repeated where the batch is larger; images of another size fail it."""
    np.save(tmp_path / "pixels.npy", np.zeros((3, 16, 16, 3), np.uint8))
    data = EvalSet(tmp_path / "pixels.npy", Preprocessing((16, 16)), 3)
    timings = alternate({"a": fake(batch=8)}, data=data, batch=8, rounds=1, warmup=0, runs=2, min_seconds=0)
    assert timings.latency("a").runs == 2
    timings = alternate(
        {"a": fake(image_size=(32, 32))}, data=data, rounds=1, warmup=0, runs=1, min_seconds=0
    )
    assert "32" in str(timings.failed["a"])


def test_summary_in_milliseconds():
    """Percentiles are those of all calls, in ms; p90/p50 above 1.5 is unstable."""
    calm = summarize(np.arange(1, 102) * 10_000 + 10_000_000)
    assert (calm.p50, calm.p90, calm.min, calm.runs) == pytest.approx((10.51, 10.91, 10.01, 101))
    assert calm.p50 <= calm.p90 <= calm.p99
    assert not calm.unstable
    assert summarize(np.array([10, 10, 10, 10, 16, 16]) * 1_000_000).unstable
    one = summarize(np.array([2_000_000]))
    assert (one.p50, one.p99, one.mean, one.min) == (2, 2, 2, 2)


def test_ratio_is_of_medians_over_all_rounds():
    """One slow round among many, or one outlier, does not move a ratio of medians."""
    calm = np.full(25, 10_000_000)
    noisy = np.append(calm[:-1], 900_000_000)
    timings = Timings({"a": (calm * 2, noisy * 2, calm * 2), "b": (calm, calm, calm)})
    assert timings.median_ratio("a", "b") == 2.0
    assert timings.median_ratio("b", "a") == 0.5
