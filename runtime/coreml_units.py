"""A Core ML artifact on each kind of compute unit of a Mac: speed, accuracy and where the work went.

int8 activations pay only on the Neural Engine of recent chips, and Core ML decides alone what runs where,
so one latency for a Mac says little: this gives one row for each compute unit, with its placement.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from vit_export.artifacts import Accuracy, EvalSet, Latency, Logits, Runnable
from vit_export.errors import VitExportError
from vit_export.runtime.coreml_device import Placement, placement
from vit_export.runtime.coreml_runner import latency_reason
from vit_export.runtime.latency import summarize
from vit_export.runtime.worker_client import Worker

COMPUTE_UNITS = ("CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE", "ALL")
WARMUP, RUNS = 10, 50


@dataclass(frozen=True, slots=True)
class UnitResult:
    """What one choice of compute units gave; `reason` says why the rest is missing.

    load_seconds: from the start of the worker to the loaded model, compilation included.
    """

    compute_units: str
    version: str = ""
    load_seconds: float | None = None
    latency: Latency | None = None
    accuracy: Accuracy | None = None
    placement: Placement | None = None
    reason: str = ""


def by_compute_unit(
    runnable: Runnable,
    data: EvalSet,
    out: Path,
    accuracy: Callable[[Logits], Accuracy],
    *,
    units: tuple[str, ...] = COMPUTE_UNITS,
    timeout: float = 600.0,
) -> tuple[UnitResult, ...]:
    """Run `runnable` on every choice of compute units, one after the other, each in its own processes.

    accuracy: compares the outputs for `data` with the baseline's. out: folder for the outputs (.npy).
    10 warm-ups and at least 50 timed calls. What fails on one choice is its `reason` and stops no other.
    """
    return tuple(_measure(runnable, unit, data, out, accuracy, timeout) for unit in units)


def profile(
    runnable: Runnable,
    data: EvalSet,
    out: Path,
    accuracy: Callable[[Logits], Accuracy],
    timeout: float,
) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """`by_compute_unit` as a report carries it; nothing where Apple's runtime does not run the package."""
    if latency_reason(runnable):
        return {}, ()
    rows = by_compute_unit(runnable, data, out, accuracy, units=COMPUTE_UNITS, timeout=timeout)
    return {"compute_units": msgspec.to_builtins(rows)}, tuple(_words(row) for row in rows)


def _words(row: UnitResult) -> str:
    """`CPU_AND_NE: 3.2 ms, loaded in 1.4 s, agreement 0.990, planned cost 96 % neural engine, 4 % cpu`."""
    facts = [f"{row.latency.p50:.2f} ms" if row.latency else ""]
    facts.append(f"loaded in {row.load_seconds:.1f} s" if row.load_seconds is not None else "")
    facts.append(f"agreement {row.accuracy.agreement:.3f}" if row.accuracy else "")
    if row.placement:
        shares = sorted(row.placement.cost.items(), key=lambda item: -item[1])
        facts.append("planned cost " + ", ".join(f"{share:.0%} {device}" for device, share in shares))
    return f"{row.compute_units}: " + ", ".join(filter(None, (*facts, row.reason)))


def _measure(
    runnable: Runnable,
    unit: str,
    data: EvalSet,
    out: Path,
    accuracy: Callable[[Logits], Accuracy],
    timeout: float,
) -> UnitResult:
    options: Mapping[str, object] = {**runnable.options, "compute_units": unit}
    result = UnitResult(unit)
    try:
        with Worker(replace(runnable, options=options), timeout=timeout) as worker:
            result = replace(result, version=worker.opened.version, load_seconds=worker.opened.seconds)
            outputs = worker.infer(data, out / f"{unit.lower()}.npy", batch=1)
            times = worker.time(data, batch=worker.opened.batch or 1, warmup=WARMUP, runs=RUNS)
        result = replace(result, accuracy=accuracy(outputs), latency=summarize(times))
        function = options.get("function")
        where = placement(runnable.path, unit, str(function) if function else None, timeout=timeout)
        return replace(result, placement=where)
    except VitExportError as error:
        return replace(result, reason=error.message)
