"""Calibrating and building all artifacts of one image size, each complete or absent."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from vit_export import __version__
from vit_export.artifacts import (
    BuildRequest,
    BuiltArtifact,
    EvalSet,
    LoadedModel,
    Precision,
    Program,
    QuantPlan,
    Ranges,
    TargetProfile,
)
from vit_export.calibration.plan import read as read_plan
from vit_export.calibration.plan import save as save_plan
from vit_export.calibration.preprocess import Batches, batches
from vit_export.export import rewritten
from vit_export.export.center import center
from vit_export.export.quantize import quantize
from vit_export.export.target import Target
from vit_export.job import ExportJob
from vit_export.runtime.files import atomic_directory
from vit_export.runtime.protocol import ProgressCallback
from vit_export.runtime.report_schema import Result, TuningStep
from vit_export.search.search import Search
from vit_export.stage_keys import chips, key
from vit_export.stages import Stages, artifact_of, failure
from vit_export.store import Key

Built = tuple[Target, BuiltArtifact] | Result  # a failed result where there is no artifact

_BATCH = 8  # images a calibration step, where the program takes any number
_SAMPLES = 8  # images a target may look at while it builds


def export(program: Program, plan: QuantPlan | None, target: Target, request: BuildRequest) -> BuiltArtifact:
    """Quantise for a target (when the precision is int8) and build its artifact in request.folder."""
    profile = target.profile(request.precision, {**request.options, "opset": request.opset})
    if request.precision is Precision.INT8 and plan is not None:
        program = quantize(program, plan, profile)
    elif profile.rest == "float16" and request.samples is not None:
        program = center(program, request.samples)
    return target.build(program, request)


@dataclasses.dataclass(frozen=True, slots=True)
class Calibrated:
    """What calibration gave: the images it saw, what it measured and what was decided.

    program: the float program the plan is for; equal in function to the traced one. digest: its key.
    """

    images: EvalSet
    ranges: Ranges
    plan: QuantPlan
    program: Program
    digest: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Tuned:
    """Options that --tune chose for one artifact: of its build, by their names on the command line, and of
    its session, which its metadata carries. steps: how that came about."""

    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    session: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    steps: tuple[TuningStep, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Samples:
    """Images that targets may look at while they build. kind: `calibration images`, for the report."""

    images: EvalSet
    kind: str


def calibrated(
    job: ExportJob,
    program: Program,
    images: EvalSet,
    profile: TargetProfile,
    path: Path,
    notify: ProgressCallback,
    *,
    embeddings: bool = False,
) -> Calibrated:
    """Run the calibration images through the program, decide, and save the plan at `path`.

    profile: what candidates are judged under (see `judging_profile`).
    """
    step = _BATCH if program.dynamic_batch else program.batch_size
    found = Search(
        program, Batches(images, step), job.choices, profile,
        keep_float=job.keep_float, max_drop=job.max_drop, weights=job.weights,
        sensitivity=job.sensitivity, seed=job.seed, embeddings=embeddings, notify=notify,
    ).run()  # fmt: skip
    save_plan(found.plan, path)
    return Calibrated(images, found.ranges, found.plan, found.program)


def judging_profile(job: ExportJob, targets: Sequence[Target]) -> TargetProfile:
    """The profile a plan for several targets is judged under: symmetric before others."""
    profiles = [t.profile(Precision.INT8, {**job.options, "opset": job.opset}) for t in targets]
    default = TargetProfile("asymmetric", opset=0, attention="fused")  # nothing is built: ranges alone
    return min(profiles, key=lambda profile: profile.activations != "symmetric", default=default)


def calibrated_once(
    stages: Stages,
    job: ExportJob,
    program: Program,
    digest: str,
    images: EvalSet,
    profile: TargetProfile,
    path: Path,
    work: Path,
    notify: ProgressCallback,
    *,
    embeddings: bool = False,
) -> Calibrated:
    """`calibrated`, or what it gave before; the program comes from its files either way.

    path: where the plan is wanted; work: an empty folder.
    """
    decided = key(
        "calibrate",
        program=digest,
        images=images.digest,
        labels=images.labels,
        choices=job.choices,
        keep_float=job.keep_float,
        max_drop=job.max_drop,
        weights=job.weights or "with activations",
        sensitivity=job.sensitivity,
        seed=job.seed,
        profile=profile if job.judges else "not looked at",
        embeddings=embeddings,
    )

    def make(folder: Path) -> object:
        plan = folder / "plan.json"
        found = calibrated(job, program, images, profile, plan, notify, embeddings=embeddings)
        rewritten.save(found.program, program, folder)
        return found.ranges

    ranges = stages.once("calibrate", decided, work, make)
    plan = read_plan(work / "plan.json")
    save_plan(plan, path)
    ready = rewritten.load(program, work)
    return Calibrated(images, msgspec.convert(ranges, Ranges), plan, ready, decided.digest)


def build_key(builder: SizeBuilder, target: Target, precision: Precision) -> Key:
    """What decides the bytes of one artifact."""
    job, known, samples = builder.tuned_job(target, precision), builder.calibration, builder.samples
    looks = target.profile(precision, {**job.options, "opset": job.opset}).rest == "float16"
    return key(
        "build",
        program=builder.digest,
        calibration=known.digest if known else "none",
        samples=f"{samples.kind} {samples.images.digest}" if looks else "not looked at",
        target=target.name,
        precision=str(precision),
        opset=job.opset,
        batch_size=job.batch_size,
        options=job.options,
        metadata=builder.metadata(target, precision),
        device=chips() if target.name == "tensorrt" else "any",
    )


@dataclasses.dataclass(frozen=True, slots=True)
class SizeBuilder:
    """Builds every target at every precision from one program."""

    job: ExportJob
    model: LoadedModel
    targets: Sequence[Target]
    program: Program
    calibration: Calibrated | None
    samples: Samples
    notify: ProgressCallback
    stages: Stages
    digest: str  # of the program
    tuned: Mapping[tuple[str, Precision], Tuned] = dataclasses.field(default_factory=dict)

    def build_all(self) -> Iterator[Built]:
        """One artifact, or one failed result, for each target and precision."""
        wanted = [(target, precision) for target in self.targets for precision in self.job.precisions]
        for done, (target, precision) in enumerate(wanted):
            self.notify(f"build {target.name} {precision}", done, len(wanted))
            try:
                yield target, self._build(target, precision)
            except Exception as error:  # noqa: BLE001  (`failure` sorts them)
                yield Result(
                    target=target.name,
                    precision=precision,
                    image_size=self.model.image_size,
                    status="failed",
                    reason=failure(error, self.job.output),
                )

    def _build(self, target: Target, precision: Precision) -> BuiltArtifact:
        height, width = self.model.image_size
        final = self.job.output / target.name / precision / f"{height}x{width}"
        key = build_key(self, target, precision)
        with atomic_directory(final) as folder:

            def make(_: Path) -> object:
                built = self.make(target, precision, folder)
                return dataclasses.replace(built, path=built.path.relative_to(folder))

            note = self.stages.once(f"build {target.name} {precision}", key, folder, make, link=False)
        return artifact_of(note, final)

    def make(self, target: Target, precision: Precision, folder: Path) -> BuiltArtifact:
        """Build one artifact in `folder`, which is empty."""
        known = self.calibration
        quantised = precision is Precision.INT8 and known is not None
        program = known.program if quantised and known else self.program
        return export(
            program, known.plan if known else None, target, self._request(target, precision, folder)
        )

    def tuned_job(self, target: Target, precision: Precision) -> ExportJob:
        """The job with the build options that were tuned for an artifact."""
        chosen = dict(self.tuned.get((target.name, precision), Tuned()).options)
        opset = chosen.pop("opset", self.job.opset)
        return dataclasses.replace(self.job, opset=opset, options={**self.job.options, **chosen})

    def _request(self, target: Target, precision: Precision, folder: Path) -> BuildRequest:
        known, job = self.calibration, self.tuned_job(target, precision)
        few = next(batches(self.samples.images, _SAMPLES))
        return BuildRequest(
            precision=precision,
            folder=folder,
            preprocessing=self.model.preprocessing,
            opset=job.opset,
            batch_size=job.batch_size,
            ranges=known.ranges if known else None,
            metadata=self.metadata(target, precision),
            options=job.options,
            samples=few,
            samples_are=f"{len(few)} {self.samples.kind}",
            timeout=self.job.timeout,
        )

    def metadata(self, target: Target, precision: Precision) -> Mapping[str, str]:
        """What the artifact says of itself; runners read `session`."""
        contract = self.model.preprocessing
        session = self.tuned.get((target.name, precision), Tuned()).session
        return {
            **({"session": msgspec.json.encode(session, order="sorted").decode()} if session else {}),
            "producer": f"vit-export {__version__}",
            "model": self.model.spec,
            "precision": precision,
            "preprocessing": msgspec.json.encode(contract).decode(),
            "preprocessing_sha256": contract.digest(),
        }
