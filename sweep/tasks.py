"""What a Dask worker does. Each task is a stage of an ordinary run, kept in the store under its key.

    prepare ─▶ part ×n ──────────────────────┐
       ├─────▶ calibrate ─▶ build ─▶ part ×n ─┴▶ row          one `build`, `part`s and `row` a cell
       └───────────────────────────────────────▶ time         a report's cells of one size on one device

Tasks hand on names and keys, never tensors: images, weights, artifacts and outputs go through the store. A
task does not raise; what goes wrong is its `failed`, which its followers pass on, so that one bad cell is one
failed row. What a killed worker had not stored is made again by the next.
"""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from vit_export import stage_keys
from vit_export.artifacts import BuiltArtifact, LoadedModel, Precision, Preprocessing, Program, Runnable
from vit_export.calibration.checks import check_labels
from vit_export.calibration.images import ImageSource
from vit_export.errors import RunnerError, VitExportError
from vit_export.job import ExportJob, ImageSources, open_sources
from vit_export.runtime.environment import physical_cores
from vit_export.runtime.report_schema import Ceilings
from vit_export.runtime.roofline import CPU_TARGETS, measure_ceilings
from vit_export.runtime.timed import BASELINE
from vit_export.stages import Stages, artifact_of, silent
from vit_export.store import Key, Store

if TYPE_CHECKING:
    from vit_export.one_size import OneSize

_KEEP = 2  # traced models a worker process holds
_TRACED: dict[str, tuple[LoadedModel, LoadedModel, Program, str]] = {}  # by what was traced


@dataclass(frozen=True, slots=True)
class Task:
    """What every task is told. calib, evaluation: digests of the images, labels: of those evaluated.

    source: digest of the model's files; an empty one means that the model must be loaded to know it.
    """

    job: ExportJob
    store: str
    calib: str = ""
    evaluation: str = ""
    labels: str = ""
    source: str = ""


@dataclass(frozen=True, slots=True)
class Done:
    """What a task gives. value: JSON-able; keys: of the stages it used, by name; made, reused: their names.

    failed: why there is no value. seconds: of work; read, written: bytes of the store; host: who did it.
    """

    stage: str
    value: Any = None
    keys: Mapping[str, Key] = field(default_factory=dict)
    made: tuple[str, ...] = ()
    reused: tuple[str, ...] = ()
    failed: str = ""
    seconds: float = 0.0
    read: int = 0
    written: int = 0
    host: str = ""


class Prepared(msgspec.Struct, frozen=True):
    """The traced model without the model. content: what its baseline's logits depend on; runner: of it."""

    digest: str
    content: str
    contract: Preprocessing
    dynamic: bool
    batch: int
    runner: str


def prepare(task: Task) -> Done:
    """Load, adapt and trace the model; keep its baseline."""

    def work(stages: Stages, folder: Path) -> object:
        one = _one_size(task, stages, folder)
        program = one.trace()
        runnable = one.baseline(program)
        if runnable.runner != BASELINE:  # an .onnx file: other machines need not have it
            one.keep(runnable)
        return Prepared(
            one.digest, one.content(runnable), one.model.preprocessing, program.dynamic_batch,
            program.batch_size, runnable.runner,
        )  # fmt: skip

    return _kept("prepare", task, work)


def calibrate(task: Task, prepared: Done) -> Done:
    """The ranges and the plan of an int8 cell."""

    def work(stages: Stages, folder: Path) -> object:
        one = _one_size(task, stages, folder)
        one.calibrate(one.trace())
        return None

    return _kept("calibrate", task, work, prepared)


def build(task: Task, *before: Done) -> Done:
    """The artifact of a cell; what its target refuses is the value's `reason`."""

    def work(stages: Stages, folder: Path) -> object:
        one = _one_size(task, stages, folder)
        program = one.trace()
        images = one.pixels("eval")
        shown = next(iter(images.parts), images)
        (item,) = one.builder(program, one.calibrate(program), shown).build_all()
        if not isinstance(item, tuple):
            raise RunnerError(item.reason)
        return {"details": item[1].details, "not_run": item[0].not_run()}

    return _kept("build", task, work, *before)


def part(task: Task, index: int, prepared: Done, built: Done | None = None) -> Done:
    """Predictions for one part of the evaluation images: of the baseline, or of a built artifact."""

    def work(stages: Stages, folder: Path) -> object:
        known = msgspec.convert(prepared.value, Prepared)
        source = _sources(task).evaluation
        name, runnable = _runnable(task, stages, folder, prepared, built)
        if source is None:
            images = _noise(task, known, folder)
        else:
            piece = _pieces(source, task.job)[index]
            images = stages.pixels("eval images", piece, known.contract, folder / "images")
        stages.predict(
            name, runnable, images, folder / "logits",
            batch=_batch(known, images.count, source, task.job), timeout=task.job.timeout,
            notify=silent, content=known.content if built is None else "",
        )  # fmt: skip
        return {"images": images.count}

    return _kept("evaluate", task, work, *(done for done in (prepared, built) if done), index=index)


def row(task: Task, prepared: Done, built: Done, base: Sequence[Done], parts: Sequence[Done]) -> Done:
    """The cell as the report of a run with one artifact, not timed; all of it is in the store by now."""

    def work(stages: Stages, folder: Path) -> object:
        from vit_export.pipeline import report_of
        from vit_export.runtime.report_schema import encode

        target, precision = task.job.targets[0], task.job.precisions[0]
        name = f"{target} {precision}"
        answers = {BASELINE: _answers(BASELINE, base), name: _answers(name, parts)}
        stages = replace(stages, answers={name: keys for name, keys in answers.items() if keys})
        one = _one_size(task, stages, folder)
        for source in one.sources.all():
            check_labels(source, one.model.num_classes)
        report = report_of(one.job, "", one.model, one.sources, [one.run()], ())
        return encode(report).decode()

    return _kept("row", task, work, prepared, built, *base, *parts)


def measure(tasks: Sequence[Task], again: bool, prepared: Done, built: Sequence[Done]) -> Done:
    """Latencies of the cells of one size, in alternating rounds with their baseline; nothing else runs here.

    With them goes what the processor reaches with large products, for cells that run on it.
    Kept for this machine and these artifacts unless `again`.
    """
    task = tasks[0]

    pairs = [(one, done) for one, done in zip(tasks, built, strict=True) if not done.failed]

    def work(stages: Stages, folder: Path) -> object:
        from distributed import Lock

        from vit_export.runtime.latency import alternate

        height, width = msgspec.convert(prepared.value, Prepared).contract.size
        _, baseline = _runnable(task, stages, folder / "base", prepared, None)
        runnables = {BASELINE: baseline}
        for number, (one, done) in enumerate(pairs):
            name, runnable = _runnable(one, stages, folder / str(number), prepared, done)
            runnables[f"{name} {height}x{width}"] = runnable
        with Lock(f"vit-export latency {platform.node()}"):  # workers may share a machine
            timings = alternate(runnables, batch=task.job.batch_size or 1, timeout=task.job.timeout)
            counted = any(one.job.targets[0] in CPU_TARGETS for one, _ in pairs)
            ceilings = _ceilings(task.job.threads) if counted else None
        return {
            "ceilings": ceilings,
            "rounds": {name: [turn.tolist() for turn in turns] for name, turns in timings.rounds.items()},
            "failed": {name: str(error) for name, error in timings.failed.items()},
        }

    known = replace(task, source="" if again else task.source or "told by its artifacts")
    seen = [key.digest for _, done in pairs for name, key in done.keys.items() if name.startswith("build")]
    return _kept("latency", known, work, prepared, artifacts=seen, node=platform.node())


@cache
def _ceilings(threads: int) -> Ceilings | None:
    """Measured once by a worker, for all that it times."""
    return measure_ceilings(threads)


def _answers(name: str, parts: Sequence[Done]) -> tuple[Key, ...]:
    return tuple(done.keys[f"evaluate {name}"] for done in parts)


def _kept(
    stage: str, task: Task, work: Callable[[Stages, Path], object], *before: Done, **more: object
) -> Done:
    """Do `work`, or find that it was done: where the model's files are known it need not be loaded for that.

    The stages inside are kept on their own, so what `work` is run for again, it finds finished.
    """
    began = time.perf_counter()
    store = Store(task.store)
    made: list[str] = []
    value: Any = None
    keys: Mapping[str, Key] = {}
    failed = next((done.failed for done in before if done.failed), "")
    if not failed:
        try:
            with tempfile.TemporaryDirectory(prefix="vit-export-", ignore_cleanup_errors=True) as folder:

                def make(_: Path) -> dict[str, Any]:
                    made.append(stage)
                    inside = Stages(store)
                    found = work(inside, Path(folder))
                    made.extend(name for name in inside.made)
                    return {"value": msgspec.to_builtins(found), "keys": _plain(inside.keys)}

                note = make(Path()) if not task.source else _once(store, stage, task, make, more)
                value, keys = note["value"], msgspec.convert(note["keys"], dict[str, Key])
        except VitExportError as error:
            failed = str(error)
        except MemoryError:
            failed = "there was not enough memory for this stage"
    return Done(
        stage=stage, value=value, keys=keys, made=tuple(made), reused=() if made or failed else (stage,),
        failed=failed, seconds=time.perf_counter() - began, read=store.read_bytes,
        written=store.written_bytes, host=platform.node(),
    )  # fmt: skip


def _once(
    store: Store, stage: str, task: Task, make: Callable[[Path], object], more: Mapping[str, object]
) -> Any:
    int8 = Precision.INT8 in task.job.precisions
    decisive = replace(
        task.job, output=Path(), store=None, timeout=0.0, model="", calib=None, evaluation=None,
        max_drop=task.job.max_drop if int8 else None,
    )  # fmt: skip
    key = stage_keys.key(
        "cell",
        task=stage,
        job=replace(decisive, threads=decisive.threads or physical_cores()),
        source=task.source,
        calib=task.calib if int8 else "",
        evaluation=task.evaluation,
        labels=task.labels,
        machine=stage_keys.machine(),
        **more,
    )
    with tempfile.TemporaryDirectory() as empty:
        return store.once(key, Path(empty), make)[0]


def _plain(keys: Mapping[str, Key]) -> dict[str, Any]:
    return {name: msgspec.to_builtins(key) for name, key in keys.items()}


def _one_size(task: Task, stages: Stages, folder: Path) -> OneSize:
    """The job's model at the job's size; one that this process has traced before is not traced again."""
    from vit_export.export.targets import target_named
    from vit_export.models import adapt
    from vit_export.one_size import OneSize
    from vit_export.pipeline import load_seeded

    job = replace(task.job, output=folder / "out")
    (folder / "out").mkdir(parents=True, exist_ok=True)
    told = [job.load, job.adapt, job.image_sizes, job.batch_size, job.seed]
    known = stage_keys.digest([task.source, *told]) if task.source else ""
    if known not in _TRACED:
        model = load_seeded(job)
        (size,) = job.image_sizes or (model.image_size,)
        adapted = adapt(model, size, job.adapt)
        first = OneSize(job, adapted, (), ImageSources(None, None), folder, silent, stages)
        while len(_TRACED) >= _KEEP:
            _TRACED.pop(next(iter(_TRACED)))
        _TRACED[known] = model, adapted, first.trace(), first.digest
    model, adapted, program, digest = _TRACED[known] if known else _TRACED.pop(known)
    targets = [target_named(name) for name in job.targets]
    return OneSize(
        job, adapted, targets, _sources(task), folder, silent, stages,
        timed=False, digest=digest, traced=program, native=model,
    )  # fmt: skip


def _sources(task: Task) -> ImageSources:
    """The job's images, their digests known."""
    found = open_sources(task.job)

    def known(source: ImageSource | None, digest: str) -> ImageSource | None:
        return source and replace(source, known=digest)

    return replace(
        found,
        calibration=known(found.calibration, task.calib),
        evaluation=known(found.evaluation, task.evaluation),
    )


def _pieces(source: ImageSource, job: ExportJob) -> Sequence[ImageSource]:
    return source.parts(job.part) if job.part and len(source) > job.part else [source]


def parts_of(count: int, part: int | None) -> int:
    """How many parts `count` evaluation images have; one where there are none, for the noise."""
    return -(-count // part) if part and count > part else 1


def _batch(known: Prepared, count: int, source: ImageSource | None, job: ExportJob) -> int:
    """As a run of one process: 16, or all of fewer images, or what the model's code fixes."""
    if not known.dynamic:
        return known.batch
    return 16 if source is not None and parts_of(len(source), job.part) > 1 else min(16, count)


def _noise(task: Task, known: Prepared, folder: Path) -> Any:
    from vit_export.job import synthetic_pixels

    return synthetic_pixels(known.contract, folder, task.job.seed)


def _runnable(
    task: Task, stages: Stages, folder: Path, prepared: Done, built: Done | None
) -> tuple[str, Runnable]:
    """(name, runnable) of the baseline or of a cell's artifact, brought here from the store."""
    if built is None:
        _bring(stages, prepared.keys["baseline"], folder)
        known = msgspec.convert(prepared.value, Prepared)
        (path,) = [*folder.glob("*.pt2"), *folder.glob("*.onnx")]
        return BASELINE, Runnable(known.runner, path, task.job.threads)
    from vit_export.export.targets import target_named

    name = f"{task.job.targets[0]} {task.job.precisions[0]}"
    note = _bring(stages, built.keys[f"build {name}"], folder / "artifact")
    artifact: BuiltArtifact = artifact_of(note, folder / "artifact")
    return name, target_named(task.job.targets[0]).runnable(artifact, task.job.threads)


def _bring(stages: Stages, key: Key, folder: Path) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    entry = stages.store.get(key, folder, link=True) if stages.store else None
    if entry is None:
        raise RunnerError(f"the store has lost {key.stage} {key.digest[:12]}", "run the sweep again")
    return entry.note
