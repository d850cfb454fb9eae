"""One artifact for several image sizes, where a target has such a thing (functions of a Core ML package)."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

import msgspec

from vit_export.artifacts import BuiltArtifact, Precision
from vit_export.errors import ParityError, TargetError, VitExportError
from vit_export.export.target import Target
from vit_export.job import ExportJob, first_images
from vit_export.one_size import Outcome
from vit_export.runtime.accuracy import sqnr_db
from vit_export.runtime.files import atomic_directory
from vit_export.runtime.inference import predict
from vit_export.runtime.protocol import ProgressCallback
from vit_export.runtime.report_schema import Result

FOLDER = "sizes"  # beside the folders of single sizes
_IMAGES = 4  # run through each size of the shared artifact
_ENOUGH_DB = 60.0  # the same program: identical in the interpreter, a rounding apart on a device


def shared(
    job: ExportJob,
    targets: Sequence[Target],
    outcomes: Sequence[Outcome],
    work: Path,
    notify: ProgressCallback,
) -> list[Outcome]:
    """The outcomes of all sizes, with artifacts that can be one made one; the single ones are removed.

    Each size of the shared artifact must answer as its own artifact did. work: a scratch folder.
    """
    found = list(outcomes)
    for target in targets:
        for precision in job.precisions:
            built = [outcome.artifact(target.name, precision) for outcome in found]
            single = [artifact for artifact in built if artifact is not None]
            if len(single) == len(found) and target.shares(single):
                notify(f"share {target.name} {precision}", 0, 1)
                found = _shared(job, target, precision, found, single, work)
    return found


def _shared(
    job: ExportJob,
    target: Target,
    precision: Precision,
    outcomes: Sequence[Outcome],
    single: Sequence[BuiltArtifact],
    work: Path,
) -> list[Outcome]:
    final = job.output / target.name / precision / FOLDER
    try:
        with atomic_directory(final) as folder:
            together = target.share(single, folder, timeout=job.timeout)
    except TargetError as error:
        return [_apart(outcome, target, precision, str(error)) for outcome in outcomes]
    together = tuple(dataclasses.replace(a, path=final / a.path.relative_to(folder)) for a in together)
    done = [
        _moved(job, target, outcome, artifact, together, work)
        for outcome, artifact in zip(outcomes, together, strict=True)
    ]
    for artifact in single:
        shutil.rmtree(artifact.path.parent)
    return done


def _apart(outcome: Outcome, target: Target, precision: Precision, reason: str) -> Outcome:
    """The outcome with a note on the result whose artifact could not be joined with the other sizes'."""

    def noted(result: Result) -> Result:
        if (result.target, result.precision) != (target.name, precision):
            return result
        note = f"one artifact for this size alone: {reason}"
        return msgspec.structs.replace(result, notes=(*result.notes, note))

    return dataclasses.replace(outcome, results=tuple(noted(result) for result in outcome.results))


def _moved(
    job: ExportJob,
    target: Target,
    outcome: Outcome,
    artifact: BuiltArtifact,
    together: Sequence[BuiltArtifact],
    work: Path,
) -> Outcome:
    """An outcome whose result of this artifact is about the shared one."""

    def renewed(result: Result) -> Result:
        if (result.target, result.precision) != (artifact.target, artifact.precision):
            return result
        result = msgspec.structs.replace(
            result,
            artifact=artifact.path.relative_to(job.output).as_posix(),
            bytes=artifact.size_bytes,
            details={**result.details, **artifact.details},
            notes=(_words(artifact, together), *result.notes),
        )
        try:
            _check(job, target, outcome, artifact, result.name, work)
        except VitExportError as error:
            return msgspec.structs.replace(result, status="failed", verdict="hold", reason=str(error))
        return result

    results = tuple(renewed(result) for result in outcome.results)
    height, width = artifact.image_size
    name = f"{artifact.target} {artifact.precision} {height}x{width}"
    runnables = {**outcome.carried.runnables, name: target.runnable(artifact, 0)}
    carried = dataclasses.replace(outcome.carried, runnables=runnables)
    return dataclasses.replace(outcome, results=results, carried=carried)


def _check(
    job: ExportJob, target: Target, outcome: Outcome, artifact: BuiltArtifact, name: str, work: Path
) -> None:
    """Raise ParityError unless a size of the shared artifact answers as its own did, where that ran."""
    before = outcome.outputs.get(name)
    if before is None:
        return
    stem = name.replace(" ", "-")
    few = first_images(outcome.evaluation, _IMAGES, work / f"{stem}-few.npy")
    runnable = target.runnable(artifact, job.threads)
    after = predict(runnable, few, work / f"{stem}-shared.npy", batch=1, timeout=job.timeout).logits
    quality = sqnr_db(before[: few.count], after)
    if quality is not None and quality < _ENOUGH_DB:
        raise ParityError(f"{name} answers differently in the shared artifact ({quality:.1f} dB)")


def _words(artifact: BuiltArtifact, together: Sequence[BuiltArtifact]) -> str:
    sizes = ", ".join(f"{height}x{width}" for height, width in (a.image_size for a in together))
    return (
        f"one package for {sizes}, weights shared; this size is its function {artifact.details['function']}"
    )
