"""Seconds and memory of stages, by the names that progress uses."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from contracts.sample_report import report, result
from vit_export.runtime.costs import Costs
from vit_export.runtime.report_schema import StageCost
from vit_export.runtime.report_sections import total

MB = 1_000_000
linux = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")


def test_a_stage_lasts_until_the_next_and_adds_up() -> None:
    """Steps of a stage do not close it; a stage that comes back is one row with both times."""
    seen: list[tuple[str, int, int]] = []
    with Costs(lambda *step: seen.append(step)) as costs:
        for stage, done in (("trace", 0), ("build", 0), ("build", 1), ("trace", 0)):
            costs.notify(stage, done, 2)
            time.sleep(0.03)
        found = costs.so_far()
    assert [cost.stage for cost in found] == ["trace", "build"]
    assert all(cost.seconds >= 0.06 for cost in found)
    assert len(seen) == 4 and seen[2] == ("build", 1, 2)


@linux
def test_a_peak_belongs_to_its_stage() -> None:
    """200 MB that one stage takes and frees are in its peak and not in the next one's."""
    with Costs(lambda *step: None) as costs:
        costs.notify("takes", 0, 1)
        held = np.ones(200 * MB, np.uint8)
        del held
        costs.notify("rests", 0, 1)
        takes, rests = costs.so_far()
    assert takes.peak_rss_bytes and rests.peak_rss_bytes
    assert takes.peak_rss_bytes - rests.peak_rss_bytes > 150 * MB


@linux
def test_children_count() -> None:
    """What a child process holds is in the stage's peak: it is the user's memory too."""
    code = "held = b'x' * 200_000_000; print(flush=True); input()"
    with Costs(lambda *step: None) as costs:
        costs.notify("alone", 0, 1)
        costs.notify("with a child", 0, 1)
        with subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as child:
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(0.3)  # several looks
            child.communicate(b"\n")
        alone, together = costs.so_far()
    assert alone.peak_rss_bytes and together.peak_rss_bytes
    assert together.peak_rss_bytes - alone.peak_rss_bytes > 150 * MB


def test_total_names_the_hungriest_stage() -> None:
    """One line for the terminal."""
    costs = (
        StageCost(stage="load", seconds=2.0, peak_rss_bytes=900 * MB),
        StageCost(stage="calibrate", seconds=40.0, peak_rss_bytes=1200 * MB),
    )
    assert total(report(result(), costs=costs)) == "took 42 s and at most 1200 MB (calibrate)"
    assert total(report(result())) == ""
