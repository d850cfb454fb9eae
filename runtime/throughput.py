"""`--throughput`: images a second over batches and threads, one call at a time and as many as fit at once.

A process for each way of opening the artifact, nothing else running. One call at a time is what a camera
needs, for 1, 2, 4... threads; calls at once (OpenVINO's THROUGHPUT hint with its streams, one ONNX Runtime
session that each thread calls by itself) are what a server needs, with all threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import msgspec

from vit_export.artifacts import EvalSet, Runnable
from vit_export.errors import VitExportError
from vit_export.runtime.environment import physical_cores
from vit_export.runtime.protocol import ProgressCallback
from vit_export.runtime.report_schema import Result, ThroughputPoint
from vit_export.runtime.worker_client import Worker

BATCHES = (1, 2, 4, 8, 16, 32)
SECONDS = 1.0  # of calls for each point, after one that is not counted

# How each CPU runner is told to let calls run at once on so many threads.
AT_ONCE: Mapping[str, Callable[[int], Mapping[str, Any]]] = {
    "onnx": lambda threads: {"streams": threads},
    "openvino": lambda threads: {"hint": "THROUGHPUT"},
}


def measured(result: Result, runnable: Runnable, images: EvalSet, notify: ProgressCallback) -> Result:
    """`result` with its curve, for artifacts that ran on this processor; a failure becomes a note."""
    if result.latency_ms is None or runnable.runner not in AT_ONCE:
        return result
    notify(f"throughput of {result.name}", 0, 1)
    try:
        return msgspec.structs.replace(result, throughput=tuple(curve(runnable, images)))
    except VitExportError as error:
        return msgspec.structs.replace(
            result, notes=(*result.notes, f"throughput was not measured: {error.message}")
        )


def curve(
    runnable: Runnable,
    images: EvalSet | None,
    *,
    batches: tuple[int, ...] | None = None,
    seconds: float | None = None,
) -> Iterator[ThroughputPoint]:
    """Points over batches, for 1, 2, 4... threads one call at a time, then for all threads at once.

    images: what is run, None for seeded noise. runnable.threads: all threads, 0 for the physical cores. An
    artifact of a fixed batch has only that. batches, seconds: BATCHES and SECONDS without.
    """
    batches, seconds = batches or BATCHES, SECONDS if seconds is None else seconds
    most = runnable.threads or physical_cores()
    for threads in _doubling(most):
        yield from _points("latency", replace(runnable, threads=threads), images, batches, seconds)
    if most > 1:
        options = {**runnable.options, **AT_ONCE[runnable.runner](most)}
        together = replace(runnable, threads=most, options=options)
        yield from _points("throughput", together, images, batches, seconds)


def _points(
    mode: Literal["latency", "throughput"],
    runnable: Runnable,
    images: EvalSet | None,
    batches: tuple[int, ...],
    seconds: float,
) -> Iterator[ThroughputPoint]:
    with Worker(runnable) as worker:
        fixed = worker.opened.batch
        for batch in (fixed,) if fixed else batches:
            said = worker.rate(images, batch=batch, seconds=seconds)
            yield ThroughputPoint(
                mode=mode,
                threads=runnable.threads,
                streams=said.streams,
                batch=batch,
                images_per_s=said.images / said.seconds,
            )


def _doubling(most: int) -> Iterator[int]:
    """1, 2, 4... and `most` itself."""
    threads = 1
    while threads < most:
        yield threads
        threads *= 2
    yield most
