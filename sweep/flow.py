"""The tasks of a sweep, each once, and what each needs of a worker."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vit_export import stage_keys
from vit_export.artifacts import Precision
from vit_export.job import ExportJob, open_sources
from vit_export.sweep import tasks
from vit_export.sweep.matrix import Cell, only_what_matters
from vit_export.sweep.tasks import Done, Task, parts_of

Resources = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Node:
    """One task: a function of `tasks`, what it is told, and the tasks whose results it takes.

    key: the same for equal work, which therefore runs once. needs: resources of the worker.
    """

    key: str
    function: Callable[..., Done]
    arguments: tuple[Any, ...]
    before: tuple[Node | tuple[Node, ...] | None, ...]
    needs: Resources

    @property
    def stage(self) -> str:
        """`build` of `build-3f…`."""
        return self.key.partition("-")[0]


@dataclass(frozen=True, slots=True)
class CellFlow:
    """The tasks that end in one cell's row."""

    cell: Cell
    task: Task
    prepare: Node
    build: Node
    row: Node
    missing: str = ""  # a resource that no worker has


@dataclass(slots=True)
class Flow:
    """Builds the tasks of all cells.

    store: where stages are kept. able: how many workers announce each resource; None when there is no cluster
    yet. threads: of one task, where the job does not say. route: target → resource to run it on.
    """

    store: str
    able: Mapping[str, int] | None = None
    threads: int = 0
    route: Mapping[str, str] = field(default_factory=dict)
    nodes: dict[str, Node] = field(default_factory=dict)
    _images: dict[str, tuple[str, str, str, int]] = field(default_factory=dict)

    def cell(self, cell: Cell) -> CellFlow:
        """The tasks of one cell; those that it shares with earlier ones are the same objects."""
        job = replace(cell.job, threads=cell.job.threads or self.threads)
        calib, evaluation, labels, count = self._looked_at(job)
        task = Task(job, self.store, calib, evaluation, labels, stage_keys.source_digest(job.model, job.load))
        shared = replace(task, job=_shared(job, int8=False), calib="")
        prepare = self._node("prepare", tasks.prepare, (shared,), (), ("pytorch",))
        pieces = range(parts_of(count, job.part))
        base = tuple(
            self._node("evaluate", tasks.part, (shared, i), (prepare,), ("pytorch",), index=i) for i in pieces
        )
        before: tuple[Node, ...] = (prepare,)
        if Precision.INT8 in job.precisions:
            calibrating = replace(task, job=_shared(job, int8=True), evaluation="", labels="")
            before += (self._node("calibrate", tasks.calibrate, (calibrating,), (prepare,), ("pytorch",)),)
        target = job.targets[0]
        runs_on = self.route.get(target, target)
        build = self._node("build", tasks.build, (task,), before, ("pytorch", f"build-{target}"))
        runs = self.able is None or runs_on in self.able
        answers = tuple(
            self._node("evaluate", tasks.part, (task, i), (prepare, build), (runs_on,), index=i)
            for i in (pieces if runs else ())
        )
        row = self._node("row", tasks.row, (task,), (prepare, build, base, answers), ("pytorch",))
        return CellFlow(cell, task, prepare, build, row, self._missing((prepare, build)))

    def timings(self, flows: Sequence[CellFlow], again: bool) -> dict[str, tuple[Node, Sequence[CellFlow]]]:
        """One task for the cells of a report that have one size and run on one kind of worker."""
        together: dict[str, list[CellFlow]] = {}
        for flow in flows:
            target = flow.cell.job.targets[0]
            runs_on = self.route.get(target, target)
            if not flow.missing and (self.able is None or runs_on in self.able):
                together.setdefault(f"{flow.cell.group} {flow.prepare.key} {runs_on}", []).append(flow)
        found: dict[str, tuple[Node, Sequence[CellFlow]]] = {}
        for name, group in together.items():
            target = group[0].cell.job.targets[0]
            needs = ("latency", self.route.get(target, target))
            told = tuple(replace(flow.task, job=_timed(flow)) for flow in group)
            before = (group[0].prepare, tuple(flow.build for flow in group))
            key = f"latency-{stage_keys.digest([name, [flow.build.key for flow in group]])[:24]}"
            found[name] = Node(key, tasks.measure, (told, again), before, needs), group
        return found

    def _node(
        self,
        stage: str,
        function: Callable[..., Done],
        arguments: tuple[Any, ...],
        before: tuple[Any, ...],
        needs: Resources,
        **more: object,
    ) -> Node:
        task: Task = arguments[0]
        facts = [stage, _told(task), more, [node.key for node in flat(before)]]
        key = f"{stage}-{stage_keys.digest(facts)[:24]}"
        return self.nodes.setdefault(key, Node(key, function, arguments, before, needs))

    def _looked_at(self, job: ExportJob) -> tuple[str, str, str, int]:
        """Digests of calibration images, evaluation images and their labels, and how many are evaluated."""
        asked = stage_keys.digest(
            [job.model, Precision.INT8 in job.precisions, str(job.calib), str(job.evaluation),
             job.calib_size, job.eval_size, job.seed]
        )  # fmt: skip
        if asked not in self._images:
            found = open_sources(job)
            calib, evaluation = found.calibration, found.evaluation
            labels = evaluation.labels if evaluation else None
            self._images[asked] = (
                calib.digest() if calib else "",
                evaluation.digest() if evaluation else "",
                stage_keys.digest(labels),
                len(evaluation) if evaluation else 0,
            )
        return self._images[asked]

    def _missing(self, nodes: Sequence[Node]) -> str:
        """The first resource that no worker of the cluster has."""
        if self.able is None:
            return ""
        return next((name for node in nodes for name in node.needs if name not in self.able), "")


def flat(before: Sequence[Any]) -> Iterator[Node]:
    """The tasks among what a task takes."""
    for item in before:
        if isinstance(item, Node):
            yield item
        elif item is not None:
            yield from flat(item)


def _told(task: Task) -> list[object]:
    """What of a task decides its result, as far as the client can see."""
    job = replace(task.job, store=None, timeout=0.0)
    return [job, task.calib, task.evaluation, task.labels, task.source]


def _shared(job: ExportJob, *, int8: bool) -> ExportJob:
    """The job without what only tells cells of one traced model, or of one calibration, apart."""
    if int8:
        judged_on = job.eval_size if job.evaluation is None and job.calib else None
        job = replace(job, eval_size=judged_on, precisions=(Precision.INT8,))
        # Where candidates are judged, it is under the target's profile.
        return job if job.judges else replace(job, targets=(), opset=None, options={})
    float_ = replace(job, targets=(), precisions=(Precision.FP32,), opset=None, max_drop=None, options={})
    return only_what_matters(float_)


def _timed(flow: CellFlow) -> ExportJob:
    """Latency is measured with the threads that were asked for: all, not a worker's share, without any."""
    return replace(flow.task.job, threads=flow.cell.job.threads)
