"""Everything that happens at one image size: trace, calibrate, build, run, time, judge."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from vit_export.artifacts import (
    BuiltArtifact,
    EvalSet,
    LoadedModel,
    Logits,
    Precision,
    Program,
    QuantPlan,
    Runnable,
)
from vit_export.attention_job import AttentionJob
from vit_export.blame_size import Blame
from vit_export.build_size import (
    Built,
    Calibrated,
    Samples,
    SizeBuilder,
    Tuned,
    calibrated_once,
    judging_profile,
)
from vit_export.calibration.checks import inspect
from vit_export.calibration.preprocess import batches
from vit_export.check_size import SizeChecker
from vit_export.export.half_range import half_overflows, overflow_words
from vit_export.export.program import save_baseline, trace
from vit_export.export.target import Target
from vit_export.job import ExportJob, ImageSources, first_images, synthetic_pixels
from vit_export.kept_cost import KeptCost
from vit_export.report_extras import attention_of, record_histograms
from vit_export.runtime.accuracy import compare, predictions, score
from vit_export.runtime.bundle import SizeImages
from vit_export.runtime.inference import Prediction
from vit_export.runtime.latency import Timings, alternate
from vit_export.runtime.profiles import profiled
from vit_export.runtime.protocol import ProgressCallback
from vit_export.runtime.report_schema import Baseline, PackedIds, Result
from vit_export.runtime.throughput import measured
from vit_export.runtime.timed import BASELINE, timed, timed_baseline
from vit_export.runtime.verdict import judged
from vit_export.stage_keys import digest, key, program_digest
from vit_export.stages import Stages
from vit_export.tuning import Tuner

_HALF_IMAGES = 8  # images on which an overflow of float16 is looked for
_TUNE_IMAGES = 32  # images on which tuned artifacts must keep their answers


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What one image size gave. calib, evaluation: the images it used; carried: what a bundle takes.

    built: the artifacts, in the order of `results`. outputs: of those that ran here, by `Result.name`.
    """

    program: Program
    baseline: Baseline
    results: tuple[Result, ...]
    evaluation: EvalSet
    calib: EvalSet | None
    doubts: tuple[str, ...]
    notes: tuple[str, ...]
    carried: SizeImages
    attention: AttentionJob | None = None
    built: tuple[BuiltArtifact | None, ...] = ()
    outputs: Mapping[str, Logits] = dataclasses.field(default_factory=dict)
    plan: QuantPlan | None = None

    def artifact(self, target: str, precision: Precision) -> BuiltArtifact | None:
        """What was built for a target at a precision; None if that failed."""
        found = (a for a in self.built if a is not None and (a.target, a.precision) == (target, precision))
        return next(found, None)


@dataclasses.dataclass(slots=True)
class OneSize:
    """One image size from adapted model to judged results."""

    job: ExportJob
    model: LoadedModel
    targets: Sequence[Target]
    sources: ImageSources
    work: Path
    notify: ProgressCallback
    stages: Stages
    timed: bool = True
    digest: str = ""  # of the program, once traced
    traced: Program | None = None
    native: LoadedModel | None = None  # the model as it was loaded
    tuned: Mapping[tuple[str, Precision], Tuned] = dataclasses.field(default_factory=dict)

    def run(self) -> Outcome:
        """Trace, calibrate, build, run, time and judge."""
        program, evaluation = self.trace(), self.pixels("eval")
        shown = next(iter(evaluation.parts), evaluation)  # what is at hand of images in parts
        calibration = self.calibrate(program)
        doubts = self._doubts(program, calibration, shown)
        baseline = self.baseline(program)
        reference = self._predict(BASELINE, baseline, evaluation)
        if calibration is not None:
            self._record(calibration)
        builder = self.builder(program, calibration, shown)
        if self.job.tune is not None:
            builder = self._tuned(builder, shown, reference.logits, self.job.tune)
        built = list(builder.build_all())
        checker = self._checker(calibration, evaluation, reference.logits)
        results, timings = self._timed(
            baseline, built, [checker.check(item) for item in built], builder, evaluation
        )
        results = [
            self._observed(result, item, reference.logits, evaluation, shown)
            for result, item in zip(results, built, strict=True)
        ]
        summary = self._baseline(reference, evaluation, timings)
        return Outcome(
            program=program,
            baseline=summary,
            results=self._judged(results),
            evaluation=evaluation,
            calib=calibration.images if calibration else None,
            doubts=doubts,
            notes=self.model.notes,
            carried=SizeImages(evaluation, reference.logits, summary, _opened(results, built)),
            attention=self._attention(program, calibration, evaluation),
            built=tuple(None if isinstance(item, Result) else item[1] for item in built),
            outputs=checker.outputs,
            plan=calibration.plan if calibration else None,
        )

    def trace(self) -> Program:
        """The program at this size, traced once; its digest is what the keys of all later stages rest on."""
        if self.traced is None:
            self.notify("trace", 0, 1)
            batch = self.job.batch_size
            self.traced = trace(self.model, batch_size=batch or 1, dynamic_batch=batch is None)
        self.digest = self.digest or program_digest(self.traced)
        return self.traced

    def builder(self, program: Program, calibration: Calibrated | None, images: EvalSet) -> SizeBuilder:
        """What builds the artifacts of this size. images: of the evaluation, those at hand."""
        samples = self._samples(calibration, images)
        return SizeBuilder(
            self.job, self.model, self.targets, program, calibration, samples, self.notify, self.stages,
            self.digest,
        )  # fmt: skip

    @property
    def _name(self) -> str:
        return f"{self.model.image_size[0]}x{self.model.image_size[1]}"

    @property
    def _embeddings(self) -> bool:
        return self.model.num_classes == 0

    def pixels(self, which: str) -> EvalSet:
        """The `eval` or `calib` images at this size; seeded noise where there are none."""
        folder = self.work / f"{which}-{self._name}"
        source = self.sources.evaluation if which == "eval" else self.sources.calibration
        if source is None:
            return synthetic_pixels(self.model.preprocessing, self.work, self.job.seed)
        wanted = (f"{which} images", source, self.model.preprocessing, folder)
        if which == "eval" and self.job.part and len(source) > self.job.part:
            return self.stages.in_parts(*wanted, self.job.part)
        return self.stages.pixels(*wanted, notify=self.notify)

    def _doubts(self, program: Program, calibration: Calibrated | None, shown: EvalSet) -> tuple[str, ...]:
        """What is odd about the calibration images, and what overflows in float16."""
        calib = calibration.images if calibration else None
        odd = inspect(calib, shown if self.sources.evaluation else None) if calib else ()
        return odd + self._overflows(program, calib or shown)

    def _overflows(self, program: Program, images: EvalSet) -> tuple[str, ...]:
        """Where float16 overflows on the first images, if any artifact computes in it."""
        options = {**self.job.options, "opset": self.job.opset}
        kinds = {t.profile(p, options).rest for t in self.targets for p in self.job.precisions}
        if "float16" not in kinds:
            return ()
        words = overflow_words(half_overflows(program, next(batches(images, _HALF_IMAGES))))
        return (words,) if words else ()

    def calibrate(self, program: Program) -> Calibrated | None:
        """Ranges and plan, where int8 is asked for."""
        if Precision.INT8 not in self.job.precisions:
            return None
        return calibrated_once(
            self.stages, self.job, program, self.digest, self.pixels("calib"),
            judging_profile(self.job, self.targets), self.job.output / self._plan_name,
            self.work / f"calibrated-{self._name}", self.notify, embeddings=self._embeddings,
        )  # fmt: skip

    @property
    def _plan_name(self) -> str:
        return "plan.json" if len(self.job.image_sizes) < 2 else f"plan-{self._name}.json"

    def _record(self, known: Calibrated) -> None:
        """The histograms that the report shows, beside the plan."""
        self.notify("record histograms", 0, 1)
        path = self.job.output / self._plan_name.replace("plan", "calibration")
        record_histograms(known, path, self.work / f"recorded-{self._name}.npy")

    def _samples(self, calibration: Calibrated | None, evaluation: EvalSet) -> Samples:
        """What shows a target the numbers inside its graph: calibration images, else those at hand."""
        if calibration is not None:
            return Samples(calibration.images, "calibration images")
        return Samples(
            evaluation, "evaluation images" if self.sources.evaluation else "images of seeded noise"
        )

    def baseline(self, program: Program) -> Runnable:
        """The FP32 source as a file that a worker opens: the program as traced, or the .onnx it came from."""
        if self.model.baseline_path is not None:
            return Runnable("onnx", self.model.baseline_path, self.job.threads)
        folder = self.work / f"baseline-{self._name}"
        decided = key("baseline", program=self.digest)
        self.notify("save the baseline", 0, 1)
        self.stages.once("baseline", decided, folder, lambda _: save_baseline(program, folder / "model.pt2"))
        return Runnable(BASELINE, folder / "model.pt2", self.job.threads)

    def keep(self, runnable: Runnable) -> None:
        """Put the files of a baseline that was not made here into the store, for machines without them."""
        folder = self.work / f"baseline-{self._name}"

        def make(_: Path) -> None:
            for file in runnable.path.parent.glob(f"{runnable.path.stem}.*"):
                shutil.copyfile(file, folder / file.name)

        self.stages.once("baseline", key("baseline", program=self.digest), folder, make)

    def content(self, runnable: Runnable) -> str:
        """What the baseline's file holds: torch writes no two alike. Empty for others."""
        return digest([self.digest, self.job.threads]) if runnable.runner == BASELINE else ""

    def _checker(self, calibration: Calibrated | None, images: EvalSet, reference: Logits) -> SizeChecker:
        blame = Blame(
            self.job, self.stages, self.work, self.trace(), self.digest, calibration, images, reference,
            self._predict, self._embeddings,
        )  # fmt: skip
        source = self.sources.evaluation
        resized = blame.resized(self.native, source) if self.native and source else ()
        plan = calibration.plan if calibration else None
        return SizeChecker(
            self.job, self.stages, plan, images, reference, self._predict, blame, resized, self.tuned,
            self._embeddings,
        )  # fmt: skip

    def _predict(self, name: str, runnable: Runnable, images: EvalSet) -> Prediction:
        """What an artifact of this size says of images."""
        program = self.trace()
        return self.stages.predict(
            name,
            runnable,
            images,
            self.work / f"{name.replace(' ', '-')}-{self._name}",
            batch=min(16, images.count) if program.dynamic_batch else program.batch_size,
            timeout=self.job.timeout,
            notify=self.notify,
            content=self.content(runnable),
        )

    def _timed(
        self,
        baseline: Runnable,
        built: Sequence[Built],
        results: Sequence[Result],
        builder: SizeBuilder,
        images: EvalSet,
    ) -> tuple[list[Result], Timings]:
        """The results with their latency, and what their layers kept float within --max-drop cost."""
        if not self.timed:
            return list(results), Timings({})
        ran = {
            result.name: item
            for item, result in zip(built, results, strict=True)
            if not isinstance(item, Result) and result.status == "ok" and not item[0].not_timed()
        }
        runnables = {name: item[0].runnable(item[1], self.job.threads) for name, item in ran.items()}
        cost = KeptCost(builder.calibration) if builder.calibration else None
        twins = self._twins(cost, builder, ran.values()) if cost else {}
        timings = alternate(
            {BASELINE: baseline, **runnables, **twins},
            data=images,
            batch=self.job.batch_size or 1,
            timeout=self.job.timeout,
            progress=lambda name, done, total: self.notify("measure latency", done, total),
        )
        found = [timed(result, timings) for result in results]
        return [cost.told(result, timings) if cost else result for result in found], timings

    def _twins(
        self, cost: KeptCost, builder: SizeBuilder, ran: Iterable[tuple[Target, BuiltArtifact]]
    ) -> dict[str, Runnable]:
        """Of int8 artifacts with layers kept within --max-drop, those without: their times tell the cost."""
        if not cost.kept:
            return {}
        targets = [target for target, artifact in ran if artifact.precision is Precision.INT8]
        folder = self.work / f"all-int8-{self._name}"
        return dict(cost.twin(builder, target, folder / target.name) for target in targets)

    def _tuned(self, builder: SizeBuilder, images: EvalSet, reference: Logits, budget: float) -> SizeBuilder:
        """The builder with what --tune chose. budget: seconds for all sizes."""
        work = self.work / f"tune-{self._name}"
        work.mkdir()
        few = first_images(images, _TUNE_IMAGES, work / "images.npy")
        share = budget / max(1, len(self.job.image_sizes))
        tuner = Tuner(builder, few, reference[: few.count], work, share, self.notify)
        self.tuned = tuner.run()
        return dataclasses.replace(builder, tuned=self.tuned)

    def _observed(
        self, result: Result, item: Built, reference: Logits, images: EvalSet, shown: EvalSet
    ) -> Result:
        """A timed artifact with its runtime's own measurements (profiles.py) and, with --throughput, more."""
        if isinstance(item, Result) or result.latency_ms is None:
            return result
        target, artifact = item
        runnable = target.runnable(artifact, self.job.threads)
        result = profiled(
            result,
            runnable,
            images,
            self.work,
            lambda logits: compare(reference, logits, images.labels, embeddings=self._embeddings),
            timeout=self.job.timeout,
        )
        return measured(result, runnable, shown, self.notify) if self.job.throughput else result

    def _judged(self, results: Sequence[Result]) -> tuple[Result, ...]:
        model, limits = self.model, self.job.limits
        return tuple(
            judged(results, family=model.family, spec=model.spec, limits=limits, embeddings=self._embeddings)
        )

    def _attention(
        self, program: Program, calibration: Calibrated | None, images: EvalSet
    ) -> AttentionJob | None:
        path = self.work / f"attention-{self._name}.npy"
        return attention_of(
            self.job, program, calibration, self.targets, images, path, classes=not self._embeddings
        )

    def _baseline(self, reference: Prediction, images: EvalSet, timings: Timings) -> Baseline:
        top1 = top5 = None
        if images.labels is not None:
            top1, top5 = score(reference.logits, images.labels, embeddings=self._embeddings)
        baseline = Baseline(
            runtime="onnxruntime" if self.model.baseline_path else BASELINE,
            precision=Precision.FP32,
            image_size=self.model.image_size,
            runtime_version=reference.version,
            top1=top1,
            top5=top5,
            peak_rss_bytes=reference.peak_rss_bytes,
            predictions=None if self._embeddings else PackedIds.pack(predictions(reference.logits)),
        )
        return timed_baseline(baseline, timings)


def _opened(results: Sequence[Result], built: Sequence[Built]) -> dict[str, Runnable]:
    """How a device opens what was built, by name."""
    pairs = zip(results, built, strict=True)
    return {r.name: item[0].runnable(item[1], 0) for r, item in pairs if not isinstance(item, Result)}
