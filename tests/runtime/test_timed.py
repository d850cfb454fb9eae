"""What is known of an artifact when it, or what it is compared with, failed while it was timed."""

from __future__ import annotations

import msgspec
import numpy as np

from contracts.sample_report import report, result
from vit_export.errors import WorkerCrash
from vit_export.runtime.latency import Timings
from vit_export.runtime.timed import BASELINE, timed, timed_baseline

NAME = "onnx int8 224x224"
BARE = msgspec.structs.replace(result(), latency_ms=None, speedup=None)
ROUND = (np.full(50, 2_000_000),)
DIED = WorkerCrash("the pytorch worker died with SIGSEGV")


def test_a_speedup_needs_both_times():
    """The baseline's crash costs its own latency and the ratio to it, not the artifact's latency."""
    both = Timings({BASELINE: (ROUND[0] * 3,), NAME: ROUND})
    alone = Timings({NAME: ROUND}, {BASELINE: DIED})
    assert (timed(BARE, both).speedup, timed(BARE, both).speedup_vs_fp16) == (3.0, None)
    found = timed(BARE, alone)
    assert (found.status, found.speedup) == ("ok", None)
    assert found.latency_ms is not None and found.latency_ms.p50 == 2.0


def test_a_failed_row_says_why():
    """An artifact that died has failed; a baseline that died has its reason instead of a latency."""
    bare = msgspec.structs.replace(report().baseline, latency_ms=None)
    gone = Timings({}, {BASELINE: DIED, NAME: DIED})
    assert (timed(BARE, gone).status, timed(BARE, gone).reason) == ("failed", str(DIED))
    found = timed_baseline(bare, gone)
    assert (found.latency_ms, found.reason) == (None, str(DIED))
    assert timed(BARE, Timings({})) == BARE and timed_baseline(bare, Timings({})) == bare
