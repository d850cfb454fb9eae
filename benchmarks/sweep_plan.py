"""A plan of 1,000 cells on 100 workers: Dask's own scheduler and workers, tasks that only sleep.

    python benchmarks/sweep_plan.py OUT/sweep.json [--workers 100] [--images 2000] [--part 128] [--faster 5]

A `LocalCluster` in this process: one `distributed.Scheduler`, `--workers` `distributed.Worker`s with one
thread each that announce what this machine does, and a `Client`. The tasks, what each waits for and which
resources it needs are those of `vit-export sweep` (`sweep.flow`), submitted by its own code
(`sweep.run.execute`). Only their work is replaced: a task sleeps for the seconds of one that ran, drawn
(seeded) from those of its stage in the given sweep, divided by `--faster`, and gives the mean bytes that it
read from and wrote to the store. Times are printed multiplied by it again. The bound is what no scheduler
beats: all work evenly on all workers, or the longest chain, first without and then with latency alone.

What it is not: a network, a mix of machines, or contention in the store. The scheduler, all workers and the
client share one process, so their own work weighs at least `--faster` times more here than in a fleet.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import dask
from distributed import Client, LocalCluster

from vit_export.artifacts import Precision
from vit_export.job import ExportJob
from vit_export.models.config import LoadOptions
from vit_export.runtime import sweep_schema
from vit_export.runtime.console import make_console, plain_table
from vit_export.runtime.doctor import diagnose
from vit_export.runtime.sweep_schema import StageWork
from vit_export.sweep.cluster import PATIENT, announced, resources
from vit_export.sweep.flow import CellFlow, Flow, Node, flat
from vit_export.sweep.matrix import Cell, only_what_matters
from vit_export.sweep.run import execute, work_of
from vit_export.sweep.tasks import Done

SIZES = ((160, 160), (192, 192), (224, 224), (288, 288), (384, 384))
TARGETS = ("onnx", "openvino")
PRECISIONS = (Precision.FP32, Precision.FP16, Precision.INT8)
_UNWATCHED = {  # every worker looks at its process 50 times a second: a hundred do so in this one
    "distributed.admin.tick.interval": "1 s",
    "distributed.admin.system-monitor.interval": "1 h",
    **PATIENT,
}


@dataclass(frozen=True, slots=True)
class Slept:
    """Instead of a task's function: takes `seconds` / `faster`, tells when."""

    stage: str
    seconds: float
    read: int
    written: int
    faster: float

    def __call__(self, *told: object) -> Done:
        began = time.time()
        time.sleep(self.seconds / self.faster)
        return Done(
            self.stage, value=(began, time.time()), made=(self.stage,), seconds=self.seconds,
            read=self.read, written=self.written,
        )  # fmt: skip


@dataclass(slots=True)
class Plan(Flow):
    """A sweep's own tasks, for images that are not there, with their work replaced by sleep."""

    recorded: Mapping[str, StageWork] = field(default_factory=dict)
    images: int = 0
    faster: float = 1.0
    draw: random.Random = field(default_factory=lambda: random.Random(0))

    def timings(self, flows: Sequence[CellFlow], again: bool) -> dict[str, tuple[Node, Sequence[CellFlow]]]:
        """As in a sweep; each sleeps."""
        found = Flow.timings(self, flows, again)
        return {
            name: (replace(node, function=self._slept("latency")), group)
            for name, (node, group) in found.items()
        }

    def _node(self, stage: str, function: object, *more: Any, **facts: object) -> Node:
        return Flow._node(self, stage, self._slept(stage), *more, **facts)

    def _slept(self, stage: str) -> Slept:
        work = self.recorded[stage]
        read, written = work.read_bytes // work.made, work.written_bytes // work.made
        return Slept(stage, self.draw.choice(work.each), read, written, self.faster)

    def _looked_at(self, job: ExportJob) -> tuple[str, str, str, int]:
        return "calib", "eval", "labels", self.images


def cells(count: int, models: int, part: int) -> list[Cell]:
    """The first `count` cells of models x sizes x targets x precisions."""
    base = ExportJob(calib=Path("c"), evaluation=Path("e"), part=part)
    made = [
        Cell(f"model{m}", {}, only_what_matters(replace(
            base, load=LoadOptions(num_classes=m + 1), image_sizes=(size,), targets=(target,),
            precisions=(precision,),
        )))
        for m in range(models) for size in SIZES for target in TARGETS for precision in PRECISIONS
    ]  # fmt: skip
    return made[:count]


def bound(nodes: Iterable[Node], workers: int) -> float:
    """Seconds below which no scheduler gets: the work shared evenly, or the longest chain of tasks."""
    ends: dict[str, float] = {}
    work = 0.0
    for node in nodes:  # each after those it waits for: the order in which a flow makes them
        seconds = node.function.seconds  # type: ignore[attr-defined]
        work += seconds
        ends[node.key] = seconds + max((ends.get(one.key, 0.0) for one in flat(node.before)), default=0.0)
    return max(work / workers, *ends.values())


def traffic(done: Iterable[Done], faster: float) -> float:
    """Most bytes that were read from the store in any 60 planned seconds, by when tasks ended."""
    minutes: dict[int, int] = {}
    for one in done:
        minute = int(one.value[1] * faster // 60)
        minutes[minute] = minutes.get(minute, 0) + one.read
    return max(minutes.values()) / 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--cells", type=int, default=1000)
    parser.add_argument("--models", type=int, default=34)
    parser.add_argument("--workers", type=int, default=100)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--part", type=int, default=128, help="images a task, as in the given sweep")
    parser.add_argument("--faster", type=float, default=5.0, help="than the tasks that were recorded")
    asked = parser.parse_args()
    recorded = {one.stage: one for one in sweep_schema.read(asked.sweep).work if one.each}
    dask.config.set(_UNWATCHED)
    with (
        LocalCluster(
            n_workers=asked.workers, threads_per_worker=1, processes=False, memory_limit=0,
            resources=resources(diagnose(probe=False)), dashboard_address=None, silence_logs="ERROR",
        ) as cluster,
        Client(cluster) as client,
    ):  # fmt: skip
        client.wait_for_workers(asked.workers)
        flow = Plan("store", announced(client), recorded=recorded, images=asked.images, faster=asked.faster)
        flows = [flow.cell(cell) for cell in cells(asked.cells, asked.models, asked.part)]
        latency = [node for node, _ in flow.timings(flows, False).values()]
        done = list(execute(client, flows, latency, lambda *_: None).values())
    report(asked, done, bound(flow.nodes.values(), asked.workers) + bound(latency, asked.workers))


def report(asked: argparse.Namespace, done: Sequence[Done], least: float) -> None:
    """Tables of stages and of the whole."""
    assert not any(one.failed for one in done), next(one.failed for one in done if one.failed)
    took = asked.faster * (max(one.value[1] for one in done) - min(one.value[0] for one in done))
    work = work_of(done)
    busy = sum(one.seconds for one in work)
    read, written = sum(one.read_bytes for one in work), sum(one.written_bytes for one in work)
    body = [
        (one.stage, str(one.made), f"{one.seconds / one.made:.1f} s", f"{one.read_bytes / 1e9:.1f}",
         f"{one.written_bytes / 1e9:.1f}") for one in work
    ]  # fmt: skip
    console = make_console()
    console.print(plain_table(("stage", "tasks", "each", "GB read", "GB written"), body))
    console.print(
        f"{asked.cells} cells, {len(done)} tasks on {asked.workers} workers: {took / 60:.1f} min, at least "
        f"{least / 60:.1f} min by any schedule; workers {100 * busy / took / asked.workers:.0f} % busy. "
        f"Store: {read / 1e9:.0f} GB read, {written / 1e9:.0f} GB written; {read / took / 1e6:.0f} MB/s read "
        f"on average, {traffic(done, asked.faster) / 1e6:.0f} MB/s in the busiest minute. "
        f"Slept {asked.faster:g} times faster: {took / asked.faster:.0f} s here.",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
