"""A sweep from its file to its report: submit, watch, time, collect."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from vit_export.errors import RunnerError
from vit_export.runtime.files import write_atomic
from vit_export.runtime.protocol import ProgressCallback
from vit_export.runtime.sweep_pages import html, markdown
from vit_export.runtime.sweep_schema import NAME, StageWork, Sweep, encode
from vit_export.sweep import cluster
from vit_export.sweep.collect import collect
from vit_export.sweep.flow import CellFlow, Flow, Node
from vit_export.sweep.matrix import Cell
from vit_export.sweep.tasks import Done
from vit_export.workspace import workspace


@dataclass(frozen=True, slots=True)
class SweepJob:
    """What `vit-export sweep` is asked for.

    store: folder or URL. workers: processes on this machine, None for as many as fit. again: measure
    latencies that the store has. route: target → resource of the workers that run it.
    """

    cells: Sequence[Cell]
    output: Path
    store: str
    scheduler: str | None = None
    tls: cluster.Tls = field(default_factory=cluster.Tls)
    workers: int | None = None
    again: bool = False
    route: Mapping[str, str] = field(default_factory=dict)
    timed: bool = True


def run(
    job: SweepJob,
    command: str,
    notify: ProgressCallback,
    say: Callable[[str], None] = lambda text: None,
) -> Sweep:
    """Run all cells; reports and artifacts are in job.output when it returns.

    say: told once where the dashboard is. A cell that fails is a failed row; raises VitExportError for what
    stops the whole sweep (no scheduler, an output that cannot be written).
    """
    with workspace(job.output), cluster.connected(job.scheduler, job.tls, job.workers) as (client, threads):
        say(f"Dask dashboard: {client.dashboard_link}{cluster.NO_DASHBOARD}")
        began = time.perf_counter()
        flow = Flow(job.store, cluster.announced(client), threads, job.route)
        flows = [flow.cell(cell) for cell in job.cells]
        timings = flow.timings(flows, job.again) if job.timed else {}
        done = execute(client, flows, [node for node, _ in timings.values()], notify)
        found = Sweep(
            created=datetime.now(timezone.utc),
            command=command,
            groups={},
            cells=(),
            work=work_of(done.values()),
            workers=len(client.scheduler_info(n_workers=-1)["workers"]),
            seconds=time.perf_counter() - began,
        )
        rows = [(one, done.get(one.row.key)) for one in flows]
        measured = [(done[node.key], group) for node, group in timings.values() if node.key in done]
        sweep = collect(rows, measured, done, job.store, job.output, found)
        write(sweep, job.output)
    return sweep


def execute(
    client: Any, flows: Sequence[CellFlow], latency: Sequence[Node], notify: ProgressCallback
) -> dict[str, Done]:
    """What became of each task, by its key; latency is measured when nothing else runs any more."""
    running = _Running(client, notify)
    for one in flows:
        if not one.missing:
            running.submit(one.row)
    running.wait()
    for node in latency:
        running.submit(node)
    running.wait()
    return running.done


def write(sweep: Sweep, output: Path) -> None:
    """sweep.json, sweep.md and sweep.html."""
    for name, content in ((NAME, encode(sweep)), ("sweep.md", markdown(sweep)), ("sweep.html", html(sweep))):
        write_atomic(output / name, content)


def exit_code(sweep: Sweep) -> int:
    """0, or 3 if a cell failed."""
    return 3 if any(cell.status == "failed" for cell in sweep.cells) else 0


def planned(cells: Sequence[Cell], store: str) -> list[tuple[str, int]]:
    """How many tasks of each stage a sweep has, without running any: (stage, tasks)."""
    flow = Flow(store)
    flows = [flow.cell(cell) for cell in cells]
    counts: dict[str, int] = {}
    for node in (*flow.nodes.values(), *(node for node, _ in flow.timings(flows, False).values())):
        counts[node.stage] = counts.get(node.stage, 0) + 1
    return list(counts.items())


@dataclass(slots=True)
class _Running:
    """Futures by key, and what became of them."""

    client: Any
    notify: ProgressCallback
    futures: dict[str, Any] = field(default_factory=dict)
    done: dict[str, Done] = field(default_factory=dict)

    def submit(self, node: Node) -> Any:
        """The future of a task, with those it needs; equal tasks are one."""
        if node.key not in self.futures:
            before = [self._given(item) for item in node.before]
            self.futures[node.key] = self.client.submit(
                _call, node.function, node.arguments, *before,
                key=node.key, resources=dict.fromkeys(node.needs, 1), pure=False,
            )  # fmt: skip
        return self.futures[node.key]

    def wait(self) -> None:
        """Until all are done. A task whose workers died three times has failed with that reason."""
        from distributed import as_completed

        waiting = {future.key: future for future in self.futures.values() if future.key not in self.done}
        total, before = len(self.futures), len(self.done)
        for count, future in enumerate(as_completed(list(waiting.values())), 1):
            self.done[future.key] = _result(future)
            self.notify(f"sweep: {future.key.partition('-')[0]}", before + count, total)

    def _given(self, item: Any) -> Any:
        if isinstance(item, tuple):
            return [self._given(one) for one in item]
        return None if item is None else self.submit(item)


def _call(function: Callable[..., Done], arguments: tuple[Any, ...], *before: Any) -> Done:
    """Runs on a worker."""
    told, *rest = arguments
    return function(told, *rest, *before)


def _result(future: Any) -> Done:
    """Raises RunnerError when the scheduler is gone; what else a task raises is its failure."""
    if future.cancelled():
        hint = "run the same command again: what had finished is in the store"
        raise RunnerError("the connection to the Dask scheduler was lost", hint)
    error = future.exception()
    if error is None:
        found: Done = future.result()
        return found
    words = str(error).strip().splitlines() or [""]
    return Done(future.key.partition("-")[0], failed=f"{type(error).__name__}: {words[0][:300]}")


def work_of(done: Iterable[Done]) -> tuple[StageWork, ...]:
    """What all tasks of each stage cost."""
    stages: dict[str, list[Done]] = {}
    for one in done:
        stages.setdefault(one.stage, []).append(one)
    return tuple(_stage_work(stage, tasks) for stage, tasks in stages.items())


def _stage_work(stage: str, tasks: Sequence[Done]) -> StageWork:
    ran = [one for one in tasks if one.made and not one.failed]
    return StageWork(
        stage=stage,
        made=len(ran),
        reused=sum(bool(one.reused and not one.failed) for one in tasks),
        failed=sum(bool(one.failed) for one in tasks),
        seconds=sum(one.seconds for one in tasks),
        each=tuple(round(one.seconds, 3) for one in ran),
        read_bytes=sum(one.read for one in tasks),
        written_bytes=sum(one.written for one in tasks),
    )
