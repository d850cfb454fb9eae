"""A plan of 1,000 cells on 100 workers from the durations of a sweep that was run: no task runs here.

    python benchmarks/sweep_plan.py OUT/sweep.json --part-seconds S [--workers 100] [--images 50000]

What it is: a discrete-event simulation. The tasks and what each waits for are those that `vit-export
sweep` would submit (`sweep.flow`); each takes the mean seconds of its stage in the given sweep, an
evaluation those of `--part-seconds` (one part of 512 images, measured by sweep_costs.py), plus an
overhead; a free worker takes the oldest ready task, and latency waits for all else, as in a sweep.
Traffic of the store: the mean bytes of a stage in that sweep, and for an evaluation also the pixels and
outputs of its images (1,000 classes). What it is not: Dask's scheduler itself, a network, or a mix of
machines; workers are equal and transfers take no time.
"""

from __future__ import annotations

import argparse
import heapq
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vit_export.artifacts import Precision
from vit_export.job import ExportJob
from vit_export.models.config import LoadOptions
from vit_export.runtime import sweep_schema
from vit_export.runtime.console import make_console, plain_table
from vit_export.runtime.sweep_schema import StageWork
from vit_export.sweep.flow import Flow, Node, flat
from vit_export.sweep.matrix import Cell, only_what_matters

SIZES = ((160, 160), (192, 192), (224, 224), (288, 288), (384, 384))
TARGETS = ("onnx", "openvino")
CLASSES = 1000
PRECISIONS = (Precision.FP32, Precision.FP16, Precision.INT8)


class Plan(Flow):
    """Tasks for images that are not there: as many evaluation images as asked for."""

    count = 0

    def _looked_at(self, job: ExportJob) -> tuple[str, str, str, int]:
        return "calib", "eval", "labels", self.count


def cells(count: int, models: int) -> list[Cell]:
    """The first `count` cells of models x sizes x targets x precisions."""
    base = ExportJob(calib=Path("c"), evaluation=Path("e"), part=512)
    made = [
        Cell(f"model{m}", {}, only_what_matters(replace(
            base, load=LoadOptions(num_classes=m), image_sizes=(size,), targets=(target,),
            precisions=(precision,),
        )))
        for m in range(models) for size in SIZES for target in TARGETS for precision in PRECISIONS
    ]  # fmt: skip
    return made[:count]


def simulate(
    nodes: Sequence[Node], seconds: dict[str, float], workers: int, start: float
) -> tuple[float, float]:
    """(end, busy seconds) of tasks on equal workers, oldest ready task first."""
    wanted = {node.key: node for node in nodes}
    waits = {n.key: {b.key for b in flat(n.before)} & wanted.keys() for n in nodes}
    followers: dict[str, list[str]] = {}
    for key, before in waits.items():
        for other in before:
            followers.setdefault(other, []).append(key)
    order = {node.key: number for number, node in enumerate(nodes)}
    ready = [(order[key], key) for key, before in waits.items() if not before]
    heapq.heapify(ready)
    running: list[tuple[float, str]] = []
    now, busy = start, 0.0
    while ready or running:
        while ready and len(running) < workers:
            _, key = heapq.heappop(ready)
            heapq.heappush(running, (now + seconds[wanted[key].stage], key))
            busy += seconds[wanted[key].stage]
        now, key = heapq.heappop(running)
        for follower in followers.get(key, ()):
            waits[follower].discard(key)
            if not waits[follower]:
                heapq.heappush(ready, (order[follower], follower))
    return now, busy


def mean(work: StageWork, overhead: float) -> float:
    """Seconds of one task of a stage."""
    return work.seconds / max(work.made, 1) + overhead


def _traffic(stage: str, work: dict[str, StageWork], flow: Flow, count: int) -> tuple[float, float]:
    """Bytes that all tasks of a stage read from the store and write to it."""
    one = work[stage]
    read, written = one.read_bytes / one.made * count, one.written_bytes / one.made * count
    if stage != "evaluate":
        return read, written
    for node in flow.nodes.values():
        if node.stage == "evaluate":
            job: ExportJob = node.arguments[0].job
            pixels = 512 * 3 * job.image_sizes[0][0] * job.image_sizes[0][1]
            made_here = not job.targets  # the baseline's task makes them, an artifact's finds them
            read += 0 if made_here else pixels
            written += 512 * CLASSES * 4 + (pixels if made_here else 0)
    return read, written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--cells", type=int, default=1000)
    parser.add_argument("--models", type=int, default=34)
    parser.add_argument("--workers", type=int, default=100)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--part-seconds", type=float, required=True, help="of one part of 512 images")
    parser.add_argument("--overhead", type=float, default=0.01, help="seconds a task, see sweep_costs.py")
    asked = parser.parse_args()
    recorded = sweep_schema.read(asked.sweep)
    work = {one.stage: one for one in recorded.work if one.made}
    flow = Plan("store")
    Plan.count = asked.images
    flows = [flow.cell(cell) for cell in cells(asked.cells, asked.models)]
    latency = [node for node, _ in flow.timings(flows, False).values()]
    seconds = {stage: mean(one, asked.overhead) for stage, one in work.items()}
    seconds["evaluate"] = asked.part_seconds + asked.overhead
    end, busy = simulate(list(flow.nodes.values()), seconds, asked.workers, 0.0)
    last, timing = simulate(latency, seconds, asked.workers, end)
    counts: dict[str, int] = {}
    for node in (*flow.nodes.values(), *latency):
        counts[node.stage] = counts.get(node.stage, 0) + 1
    traffic = {stage: _traffic(stage, work, flow, count) for stage, count in counts.items()}
    body = [
        (stage, str(count), f"{seconds[stage]:.2f} s", *(f"{size / 1e9:.1f}" for size in traffic[stage]))
        for stage, count in counts.items()
    ]
    console = make_console()
    console.print(plain_table(("stage", "tasks", "each", "GB read", "GB written"), body))
    console.print(
        f"{asked.cells} cells, {sum(counts.values())} tasks on {asked.workers} workers: {last / 60:.1f} min, "
        f"{100 * (busy + timing) / last / asked.workers:.0f} % utilised "
        f"({100 * busy / end / asked.workers:.0f} % before latency is measured)"
    )


if __name__ == "__main__":
    main()
