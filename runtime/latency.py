"""How long one call takes, measured so that the numbers of several runtimes can be divided.

Protocol. Every artifact runs in a process of its own, all with the same input, batch and thread count.
The processes are opened one after another and then take turns: A B C, A B C, ... for `rounds` rounds. A
turn is a warm-up (at least `warmup` calls and a tenth of a second), then timed calls: at least `runs` of
them and at least `min_seconds / rounds` seconds; an artifact so slow that this would take longer than
`max_seconds` in all gets fewer. Only one process is active at a time: the others wait for a line on stdin,
which uses no CPU, and a short pause before each turn lets the thread pool of the one before fall asleep.
Times are `perf_counter_ns` around the runtime's synchronous call, input ready and output on the host.
Percentiles are over the calls of all rounds; speed-ups are ratios of medians of one such run, because
frequency, neighbours and cache state then weigh on both sides alike. p90/p50 above 1.5 is `unstable`.

Two runtimes timed in one process are not comparable: their spinning thread pools take the cores from
each other (measured: ONNX Runtime int8 looked no faster than its own FP32).

    timings = alternate({"fp32": baseline, "int8": candidate}, data=evaluation)
    timings.latency("int8").p50, timings.median_ratio("fp32", "int8")
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vit_export.artifacts import EvalSet, Latency, Runnable
from vit_export.errors import VitExportError
from vit_export.runtime.protocol import ProgressCallback
from vit_export.runtime.worker_client import Worker

UNSTABLE = 1.5
SETTLE_SECONDS = 0.2  # measured: PyTorch, ONNX Runtime and OpenVINO use no CPU 0.15 s after a call

Nanoseconds = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Timings:
    """Nanoseconds of every timed call: name → one array a round. failed: why a name has none."""

    rounds: Mapping[str, tuple[Nanoseconds, ...]]
    failed: Mapping[str, VitExportError] = field(default_factory=dict)

    def latency(self, name: str) -> Latency:
        """Milliseconds over all rounds of `name`. Raises the error with which it failed."""
        return summarize(np.concatenate(self._of(name)))

    def median_ratio(self, slow: str, fast: str) -> float:
        """Median of `slow` over median of `fast`: how many times faster `fast` is."""
        return float(np.median(np.concatenate(self._of(slow))) / np.median(np.concatenate(self._of(fast))))

    def speedup(self, slow: str, fast: str) -> float | None:
        """`median_ratio`, or None if either has no times."""
        return self.median_ratio(slow, fast) if {slow, fast} <= self.rounds.keys() else None

    def round_ratios(self, slow: str, fast: str) -> tuple[float, ...]:
        """The same ratio for each round by itself; their spread says how far to trust it."""
        pairs = zip(self._of(slow), self._of(fast), strict=True)
        return tuple(float(np.median(a) / np.median(b)) for a, b in pairs)

    def _of(self, name: str) -> tuple[Nanoseconds, ...]:
        if name in self.failed:
            raise self.failed[name]
        return self.rounds[name]


def alternate(
    runnables: Mapping[str, Runnable],
    *,
    data: EvalSet | None = None,
    batch: int = 1,
    rounds: int = 4,
    warmup: int = 5,
    runs: int = 25,
    min_seconds: float = 2.0,
    max_seconds: float = 60.0,
    timeout: float = 600.0,
    progress: ProgressCallback | None = None,
) -> Timings:
    """Time `runnables` in alternating rounds; see the module for the protocol.

    data: its first `batch` images are the input; seeded noise without it.
    min_seconds, max_seconds: of timed calls for each runnable over all rounds.
    timeout: seconds to open one, and beyond `max_seconds` to answer. progress: (name, turns done, of).
    A runnable that fails is in `Timings.failed` and does not disturb the others.
    """
    times: dict[str, list[Nanoseconds]] = {name: [] for name in runnables}
    failed: dict[str, VitExportError] = {}
    limits = {"min_seconds": min_seconds / rounds, "max_seconds": max_seconds / rounds}
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for name, runnable in runnables.items():
            try:
                workers[name] = stack.enter_context(Worker(runnable, timeout=timeout))
            except VitExportError as error:
                failed[name] = error
        for turn in range(rounds * len(runnables)):
            name = list(runnables)[turn % len(runnables)]
            if name in failed:
                continue
            time.sleep(SETTLE_SECONDS)
            try:
                times[name].append(workers[name].time(data, batch=batch, warmup=warmup, runs=runs, **limits))
            except VitExportError as error:
                failed[name] = error
            if progress:
                progress(name, turn + 1, rounds * len(runnables))
    return Timings({name: tuple(times[name]) for name in runnables if name not in failed}, failed)


def summarize(ns: Nanoseconds) -> Latency:
    """Percentiles in milliseconds of call times in nanoseconds (at least one)."""
    ms = np.asarray(ns, np.float64) * 1e-6
    p50, p90, p99 = (float(value) for value in np.percentile(ms, (50, 90, 99)))
    return Latency(
        p50=p50,
        p90=p90,
        p99=p99,
        mean=float(ms.mean()),
        min=float(ms.min()),
        runs=len(ms),
        unstable=p90 > UNSTABLE * p50,
    )
