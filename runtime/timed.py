"""What a run of `latency.alternate` says of artifacts and of the baseline they were timed beside."""

from __future__ import annotations

import msgspec

from vit_export.runtime.latency import Timings
from vit_export.runtime.report_schema import Baseline, Result

BASELINE = "pytorch"  # what the baseline is called in a run of `alternate`, and the runner of a traced one


def timed(result: Result, timings: Timings) -> Result:
    """The result with its latency and what it is faster than; one whose runtime failed meanwhile has failed.

    A speed-up against what was not timed is None.
    """
    if result.name in timings.failed:
        reason = str(timings.failed[result.name])
        return msgspec.structs.replace(result, status="failed", reason=reason)
    if result.name not in timings.rounds:
        return result
    fp16 = result.name.replace(f" {result.precision} ", " fp16 ")
    return msgspec.structs.replace(
        result,
        latency_ms=timings.latency(result.name),
        speedup=timings.speedup(BASELINE, result.name),
        speedup_vs_fp16=timings.speedup(fp16, result.name),
    )


def timed_baseline(baseline: Baseline, timings: Timings) -> Baseline:
    """The baseline with its latency, or the reason why its runtime failed; as it is if it was not run."""
    if BASELINE in timings.failed:
        return msgspec.structs.replace(baseline, reason=str(timings.failed[BASELINE]))
    if BASELINE not in timings.rounds:
        return baseline
    return msgspec.structs.replace(baseline, latency_ms=timings.latency(BASELINE))
