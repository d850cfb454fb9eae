"""One image size of a bundle on this machine: build, golden images, evaluation, latency, verdicts."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from vit_export.artifacts import EvalSet, Logits, Precision, Runnable
from vit_export.errors import MissingExtra, ParityError, TargetError, VitExportError
from vit_export.runtime.accuracy import compare, predictions, score, sqnr_db
from vit_export.runtime.build_here import BUILDERS, build_here
from vit_export.runtime.bundle_manifest import Manifest, StoredArtifact, StoredSize
from vit_export.runtime.bundle_open import Bundle
from vit_export.runtime.coreml_runner import latency_reason
from vit_export.runtime.doctor import TARGETS
from vit_export.runtime.files import atomic_directory
from vit_export.runtime.latency import alternate
from vit_export.runtime.profiles import profiled
from vit_export.runtime.protocol import ProgressCallback
from vit_export.runtime.report_schema import Baseline, PackedIds, Result
from vit_export.runtime.timed import timed
from vit_export.runtime.verdict import Limits, judged
from vit_export.runtime.worker_client import Worker

# An artifact may lose this much of its SQNR on the way to the device, and is never asked for more than
# the second number: kernels differ in rounding, and real half precision rounds where a CPU does not.
GOLDEN_MARGIN_DB = 6.0
GOLDEN_ENOUGH_DB: Mapping[Precision, float] = {
    Precision.FP32: 60.0,
    Precision.FP16: 30.0,
    Precision.INT8: 15.0,
}
BUILD_SECONDS = 3600.0  # TensorRT searches its kernels on the device
_BATCH = 16


@dataclass(frozen=True, slots=True)
class VerifyJob:
    """What to verify and how. targets: empty for all in the bundle. threads: 0 for the physical cores.

    max_drop: points of top-1; when it is None the default limit informs the verdict, not the exit code.
    timeout: seconds a runtime may take to answer.
    """

    targets: tuple[str, ...] = ()
    threads: int = 0
    max_drop: float | None = None
    require_run: bool = False
    timeout: float = 600.0

    @property
    def limits(self) -> Limits:
        """The limits verdicts are judged by."""
        return Limits() if self.max_drop is None else Limits(max_drop=self.max_drop)

    def chosen(self, manifest: Manifest) -> tuple[StoredArtifact, ...]:
        """The artifacts of a bundle that this job is about."""
        return tuple(a for a in manifest.artifacts if not self.targets or a.target in self.targets)


@dataclass(slots=True)
class OneSize:
    """The artifacts of one image size, from stored files to judged results."""

    bundle: Bundle
    stored: StoredSize
    job: VerifyJob
    output: Path
    work: Path
    notify: ProgressCallback
    batch: int = 1
    runnables: dict[str, Runnable] = field(default_factory=dict)

    def run(self) -> tuple[Result, ...]:
        """Check, run, time and judge every chosen artifact."""
        images = self.bundle.images(self.stored.evaluation, self.stored.preprocessing)
        chosen = [a for a in self.job.chosen(self.bundle.manifest) if a.image_size == self.stored.image_size]
        results = [self._check(artifact, images) for artifact in chosen]
        timings = alternate(
            self.runnables,
            data=images,
            batch=self.bundle.manifest.batch_size or 1,
            timeout=self.job.timeout,
            progress=lambda name, done, total: self.notify("measure latency", done, total),
        )
        results = [self._profiled(timed(result, timings), images) for result in results]
        model = self.bundle.manifest.model
        return tuple(
            judged(
                results,
                family=model.family,
                spec=model.spec,
                limits=self.job.limits,
                embeddings=self._embeddings,
            )
        )

    def baseline(self) -> Baseline:
        """What the bundle knows of FP32 PyTorch: its accuracy on these images, not its speed here."""
        logits = self.bundle.logits(self.stored.evaluation)
        labels = self.bundle.labels(self.stored.evaluation)
        scores = (None, None) if labels is None else score(logits, labels, embeddings=self._embeddings)
        return Baseline(
            runtime=self.stored.runtime,
            precision=Precision.FP32,
            image_size=self.stored.image_size,
            runtime_version=self.stored.runtime_version,
            top1=scores[0],
            top5=scores[1],
            predictions=None if self._embeddings else PackedIds.pack(predictions(logits)),
        )

    @property
    def _embeddings(self) -> bool:
        return self.bundle.manifest.model.num_classes == 0

    def _check(self, artifact: StoredArtifact, images: EvalSet) -> Result:
        result = _result(artifact)
        try:
            if missing := _hardware(artifact.runner):
                return msgspec.structs.replace(result, status="not_run", reason=missing)
            runnable, built = self._runnable(artifact)
            result = self._run(artifact, runnable, images, result)
            if built is not None:
                result = msgspec.structs.replace(result, artifact=str(built.relative_to(self.output)))
        except MissingExtra as error:
            return msgspec.structs.replace(result, status="not_run", reason=f"{error.message}: {error.hint}")
        except VitExportError as error:
            state = "not_run" if type(error) is TargetError else "failed"
            return msgspec.structs.replace(result, status=state, reason=str(error))
        if reason := _untimed(runnable):
            return msgspec.structs.replace(result, reason=reason)
        self.runnables[result.name] = runnable
        return result

    def _runnable(self, artifact: StoredArtifact) -> tuple[Runnable, Path | None]:
        """How to open the artifact here, and the file that was built for it in the output, if any."""
        path, built = self.bundle.path(artifact.path), None
        if artifact.runner in BUILDERS:
            self.notify(f"build {artifact.target} {artifact.precision}", 0, 1)
            path = built = self._built(artifact)
        return Runnable(artifact.runner, path, self.job.threads, artifact.options), built

    def _built(self, artifact: StoredArtifact) -> Path:
        """Build from a copy of the artifact's folder, so that the bundle itself stays as it was hashed."""
        source = self.bundle.path(artifact.path).parent
        height, width = artifact.image_size
        final = self.output / artifact.target / artifact.precision / f"{height}x{width}"
        with atomic_directory(final) as folder:
            for file in source.iterdir():
                shutil.copyfile(file, folder / file.name)
            path = build_here(artifact.runner, folder / Path(artifact.path).name, timeout=BUILD_SECONDS)
        return final / path.name

    def _run(self, artifact: StoredArtifact, runnable: Runnable, images: EvalSet, result: Result) -> Result:
        """Golden images first, then all; both in one process. Raises ParityError for wrong numbers."""
        name = f"{artifact.target}-{artifact.precision}-{artifact.image_size[0]}x{artifact.image_size[1]}"
        golden = self.bundle.images(self.stored.golden, self.stored.preprocessing)
        reference = self.bundle.logits(self.stored.evaluation)
        with Worker(runnable, timeout=self.job.timeout) as worker:
            step = worker.opened.batch or _BATCH
            few = worker.infer(golden, self.work / f"{name}-golden.npy", batch=step)
            measured = _check_golden(artifact, self.bundle.logits(self.stored.golden), few)
            logits = worker.infer(
                images,
                self.work / f"{name}.npy",
                batch=step,
                progress=lambda _, done, total: self.notify(f"evaluate {name}", done, total),
            )
            info, seconds, details = worker.info(), worker.opened.seconds, worker.details(images)
        accuracy = compare(reference, logits, images.labels, embeddings=self._embeddings)
        result = msgspec.structs.replace(
            result,
            runtime_version=info.version,
            peak_rss_bytes=info.peak_rss_bytes,
            details={"golden_sqnr_db": measured, "load_seconds": round(seconds, 3), **details},
        )
        return result.with_accuracy(accuracy, None if self._embeddings else predictions(logits))

    def _profiled(self, result: Result, images: EvalSet) -> Result:
        """What the runtime's own measurements add, for runtimes that have any (profiles.py)."""
        if result.latency_ms is None:
            return result
        reference = self.bundle.logits(self.stored.evaluation)
        return profiled(
            result,
            self.runnables[result.name],
            images,
            self.work,
            lambda logits: compare(reference, logits, images.labels, embeddings=self._embeddings),
            timeout=self.job.timeout,
        )


def _result(artifact: StoredArtifact) -> Result:
    return Result(
        target=artifact.target,
        precision=artifact.precision,
        image_size=artifact.image_size,
        status="ok",
        bytes=artifact.bytes,
        kept_float=artifact.kept_float,
        float_fallback_ops=artifact.float_fallback_ops,
    )


def _check_golden(artifact: StoredArtifact, reference: Logits, logits: Logits) -> float | None:
    """SQNR in dB on the golden images, None for no error. Raises ParityError if it is too low."""
    if logits.shape != reference.shape:
        raise ParityError(f"golden images give {logits.shape[1]} outputs, PyTorch gave {reference.shape[1]}")
    found = sqnr_db(reference, logits)
    limit = GOLDEN_ENOUGH_DB[artifact.precision]
    if artifact.sqnr_db is not None:
        limit = min(limit, artifact.sqnr_db - GOLDEN_MARGIN_DB)
    if found is not None and found < limit:
        there = "" if artifact.sqnr_db is None else f", where it was exported {artifact.sqnr_db:.1f} dB"
        raise ParityError(
            f"golden images: {found:.1f} dB SQNR against FP32 PyTorch{there}",
            "this runtime computes something else; `vit-export doctor` lists known faults of its version",
        )
    return None if found is None else round(found, 2)


def _hardware(runner: str) -> str:
    """Why this machine cannot run any artifact of `runner`; empty where it can."""
    missing = {target.name: target.missing for target in TARGETS}
    return missing[runner]() if runner in BUILDERS else ""


def _untimed(runnable: Runnable) -> str:
    """Why a time measured here would mean nothing; empty where it means something."""
    return latency_reason(runnable) if runnable.runner == "coreml" else ""
