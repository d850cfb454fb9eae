"""Everything that happens at one image size: trace, calibrate, build, run, time, judge."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from vit_export.artifacts import (
    BuiltArtifact,
    EvalSet,
    LoadedModel,
    Logits,
    Precision,
    Program,
    QuantPlan,
    Runnable,
    TargetProfile,
)
from vit_export.attention_job import AttentionJob
from vit_export.build_size import Calibrated, Samples, SizeBuilder, Tuned, calibrated_once, judging_profile
from vit_export.calibration.checks import inspect
from vit_export.calibration.preprocess import Batches, batches
from vit_export.errors import ParityError
from vit_export.export.fake_quant import fake_quantized
from vit_export.export.half_range import half_overflows, overflow_words
from vit_export.export.program import PARITY, save_baseline, trace
from vit_export.export.quantize import quantize
from vit_export.export.target import Target
from vit_export.job import ExportJob, ImageSources, first_images, synthetic_pixels
from vit_export.report_extras import attention_of, record_histograms
from vit_export.runtime.accuracy import compare, predictions, score
from vit_export.runtime.bundle import SizeImages
from vit_export.runtime.inference import Prediction
from vit_export.runtime.latency import Timings, alternate
from vit_export.runtime.profiles import profiled
from vit_export.runtime.protocol import ProgressCallback
from vit_export.runtime.report_schema import Baseline, PackedIds, Result, StageLoss
from vit_export.runtime.throughput import measured
from vit_export.runtime.verdict import judged
from vit_export.search.judge import run as run_batches
from vit_export.stage_keys import digest, key, program_digest
from vit_export.stages import Stages, failure
from vit_export.tuning import Tuner

_HALF_IMAGES = 8  # images on which an overflow of float16 is looked for
_BLAME_IMAGES = 32  # images on which losses are split by stage
BASELINE = "pytorch"


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
    calibration: str = ""  # its digest, once calibrated
    traced: Program | None = None
    outputs: dict[str, Logits] = dataclasses.field(default_factory=dict)
    tuned: Mapping[tuple[str, Precision], Tuned] = dataclasses.field(default_factory=dict)

    def run(self) -> Outcome:
        """Trace, calibrate, build, run, time and judge."""
        program = self.trace()
        evaluation = self.pixels("eval")
        shown = next(iter(evaluation.parts), evaluation)  # what is at hand of images in parts
        calibration = self.calibrate(program)
        calib, plan = (calibration.images, calibration.plan) if calibration else (None, None)
        doubts = inspect(calib, shown if self.sources.evaluation else None) if calib else ()
        doubts += self._overflows(program, calib or shown)
        baseline = self.baseline(program)
        reference = self._predict(BASELINE, baseline, evaluation, program)
        if calibration is not None:
            self._record(calibration)
        builder = self.builder(program, calibration, shown)
        if self.job.tune is not None:
            builder = self._tuned(builder, shown, reference.logits, self.job.tune)
        built = list(builder.build_all())
        prepared = calibration.program if calibration else program
        results = [self._check(prepared, plan, item, reference.logits, evaluation) for item in built]
        timings = self._time(baseline, built, results, evaluation)
        results = [timed(result, timings) for result in results]
        results = [
            self._profiled(result, item, reference.logits, evaluation)
            for result, item in zip(results, built, strict=True)
        ]
        if self.job.throughput:
            results = [
                item if isinstance(item, Result) else self._throughput(result, *item, shown)
                for result, item in zip(results, built, strict=True)
            ]
        summary = self._baseline(reference, evaluation, timings)
        pairs = zip(results, built, strict=True)
        opened = {r.name: item[0].runnable(item[1], 0) for r, item in pairs if not isinstance(item, Result)}
        return Outcome(
            program,
            summary,
            tuple(
                judged(
                    results,
                    family=self.model.family,
                    spec=self.model.spec,
                    limits=self.job.limits,
                    embeddings=self._embeddings,
                )
            ),
            evaluation,
            calib,
            doubts,
            self.model.notes,
            SizeImages(evaluation, reference.logits, summary, opened),
            attention_of(
                self.job,
                program,
                calibration,
                self.targets,
                evaluation,
                self.work / f"attention-{self._name}.npy",
                classes=not self._embeddings,
            ),
            tuple(None if isinstance(item, Result) else item[1] for item in built),
            self.outputs,
            plan,
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
        known = calibrated_once(
            self.stages, self.job, program, self.digest, self.pixels("calib"),
            judging_profile(self.job, self.targets), self.job.output / self._plan_name,
            self.work / f"calibrated-{self._name}", self.notify, embeddings=self._embeddings,
        )  # fmt: skip
        self.calibration = known.digest
        return known

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

    def _predict(self, name: str, runnable: Runnable, images: EvalSet, program: Program) -> Prediction:
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

    def _check(
        self,
        program: Program,
        plan: QuantPlan | None,
        item: tuple[Target, BuiltArtifact] | Result,
        reference: Logits,
        images: EvalSet,
    ) -> Result:
        """Run one artifact on the evaluation images and compare it with the baseline."""
        if isinstance(item, Result):
            return item
        target, artifact = item
        result = self._result(target, artifact, plan)
        try:
            name = f"{artifact.target} {artifact.precision}"
            if (reason := target.not_run()) and name not in self.stages.answers:
                result = msgspec.structs.replace(result, status="not_run", reason=reason)
                return self._graph_alone(program, plan, target, artifact, reference, images, result)
            prediction = self._predict(name, target.runnable(artifact, self.job.threads), images, program)
            self._check_parity(artifact, reference, prediction.logits)
            accuracy = compare(
                reference, prediction.logits, images.labels, embeddings=self._embeddings, seed=self.job.seed
            )
            self.outputs[result.name] = prediction.logits
            result = msgspec.structs.replace(
                result,
                reason=target.not_timed(),
                runtime_version=prediction.version,
                peak_rss_bytes=prediction.peak_rss_bytes,
                details={**result.details, **prediction.details},
                stages=self._blame(program, plan, target, artifact, reference, images, prediction.logits)[0],
            )
            return result.with_accuracy(
                accuracy, None if self._embeddings else predictions(prediction.logits)
            )
        except Exception as error:  # noqa: BLE001  (`failure` sorts them)
            return msgspec.structs.replace(result, status="failed", reason=failure(error, self.job.output))

    def _graph_alone(
        self,
        program: Program,
        plan: QuantPlan | None,
        target: Target,
        artifact: BuiltArtifact,
        reference: Logits,
        images: EvalSet,
        result: Result,
    ) -> Result:
        """What can be said where the runtime is not: the numbers of the graph the artifact is made from."""
        stages, logits = self._blame(program, plan, target, artifact, reference, images, None)
        if logits is None:
            return msgspec.structs.replace(result, stages=stages)
        before = reference[: len(logits)]
        self._check_parity(artifact, before, logits)
        found = compare(before, logits, embeddings=self._embeddings, resamples=1)
        graph = {
            "sqnr_db": found.sqnr_db,
            "agreement": found.agreement,
            "cosine": found.cosine,
            "images": len(logits),
        }
        quality = "identical" if found.sqnr_db is None else f"{found.sqnr_db:.1f} dB SQNR"
        note = (
            f"its graph, run node by node in ONNX Runtime: {quality}, agreement {found.agreement:.3f} "
            f"with FP32 PyTorch on {len(logits)} images"
        )
        return msgspec.structs.replace(
            result, stages=stages, details={**result.details, "graph": graph}, notes=(note, *result.notes)
        )

    def _result(self, target: Target, artifact: BuiltArtifact, plan: QuantPlan | None) -> Result:
        quantised = artifact.precision is Precision.INT8 and plan is not None
        tuned = self.tuned.get((target.name, artifact.precision), Tuned())
        return Result(
            target=artifact.target,
            precision=artifact.precision,
            image_size=artifact.image_size,
            status="ok",
            artifact=artifact.path.relative_to(self.job.output).as_posix(),
            bytes=artifact.size_bytes,
            kept_float=plan.kept_float() if quantised and plan else (),
            float_fallback_ops=artifact.details.get("float_linears"),
            tuning=tuned.steps,
            details={**artifact.details, **({"session": dict(tuned.session)} if tuned.session else {})},
            notes=target.notes(artifact),
        )

    def _check_parity(self, artifact: BuiltArtifact, reference: Logits, logits: Logits) -> None:
        """An fp32 artifact must reproduce the baseline. Raises ParityError with the numbers."""
        if artifact.precision is not Precision.FP32:
            return
        difference = float(np.abs(reference - logits).max() / max(np.abs(reference).max(), 1e-12))
        if not difference < PARITY:
            raise ParityError(
                f"{artifact.target} fp32 differs from PyTorch by {difference:.2e} relative (limit {PARITY:g})"
            )

    def _blame(
        self,
        program: Program,
        plan: QuantPlan | None,
        target: Target,
        artifact: BuiltArtifact,
        reference: Logits,
        images: EvalSet,
        final: Logits | None,
    ) -> tuple[tuple[StageLoss, ...], Logits | None]:
        """What quantisation, lowering and the runtime each cost, on the first images.

        Also the outputs of the lowered graph, where the target has one. Nothing for FP32 that was run.
        """
        if artifact.precision is Precision.FP32 and final is not None:
            return (), None
        few = first_images(images, _BLAME_IMAGES, self.work / f"few-{self._name}.npy")
        steps: list[tuple[str, Logits]] = []
        if artifact.precision is Precision.INT8 and plan is not None:
            profile = target.profile(artifact.precision, {**self.job.options, "opset": self.job.opset})
            steps.append(("quantize", self._quantized(program, plan, profile, few)))
        lowered = target.lowered(artifact, self.job.threads, self.work)
        graph = None
        if lowered is not None:
            name = f"{artifact.target} {artifact.precision} unoptimised"
            graph = self._predict(name, lowered, few, program).logits
            steps.append(("lower", graph))
        if final is not None:
            steps.append(("runtime", final[: few.count]))
        before, stages = reference[: few.count], []
        for stage, logits in steps:
            loss = compare(before, logits, embeddings=self._embeddings, resamples=1)
            stages.append(StageLoss(stage=stage, sqnr_db=loss.sqnr_db, agreement=loss.agreement))
            before = logits
        return tuple(stages), graph

    def _quantized(
        self, program: Program, plan: QuantPlan, profile: TargetProfile, images: EvalSet
    ) -> Logits:
        """What the quantised program says in PyTorch."""
        decided = key(
            "quantize", program=self.digest, calibration=self.calibration, plan=plan, profile=profile,
            images=images.digest,
        )  # fmt: skip
        folder = self.work / f"quantized-{decided.digest[:16]}"

        def make(_: Path) -> None:
            np.save(folder / "logits.npy", _run_in_torch(quantize(program, plan, profile), images))

        self.stages.once("quantized in PyTorch", decided, folder, make)
        logits: Logits = np.load(folder / "logits.npy", allow_pickle=False)
        return logits

    def _tuned(self, builder: SizeBuilder, images: EvalSet, reference: Logits, budget: float) -> SizeBuilder:
        """The builder with what --tune chose. budget: seconds for all sizes."""
        work = self.work / f"tune-{self._name}"
        work.mkdir()
        few = first_images(images, _BLAME_IMAGES, work / "images.npy")
        share = budget / max(1, len(self.job.image_sizes))
        tuner = Tuner(builder, few, reference[: few.count], work, share, self.notify)
        self.tuned = tuner.run()
        return dataclasses.replace(builder, tuned=self.tuned)

    def _throughput(self, result: Result, target: Target, artifact: BuiltArtifact, images: EvalSet) -> Result:
        return measured(result, target.runnable(artifact, self.job.threads), images, self.notify)

    def _time(
        self,
        baseline: Runnable,
        built: Sequence[tuple[Target, BuiltArtifact] | Result],
        results: Sequence[Result],
        images: EvalSet,
    ) -> Timings:
        if not self.timed:
            return Timings({})
        runnables = {BASELINE: baseline}
        for item, result in zip(built, results, strict=True):
            if not isinstance(item, Result) and result.status == "ok" and not item[0].not_timed():
                runnables[result.name] = item[0].runnable(item[1], self.job.threads)
        return alternate(
            runnables,
            data=images,
            batch=self.job.batch_size or 1,
            timeout=self.job.timeout,
            progress=lambda name, done, total: self.notify("measure latency", done, total),
        )

    def _profiled(
        self, result: Result, item: tuple[Target, BuiltArtifact] | Result, reference: Logits, images: EvalSet
    ) -> Result:
        """What the runtime's own measurements add, for runtimes that have any (profiles.py)."""
        if isinstance(item, Result) or result.latency_ms is None:
            return result
        target, artifact = item
        return profiled(
            result,
            target.runnable(artifact, self.job.threads),
            images,
            self.work,
            lambda logits: compare(reference, logits, images.labels, embeddings=self._embeddings),
            timeout=self.job.timeout,
        )

    def _baseline(self, reference: Prediction, images: EvalSet, timings: Timings) -> Baseline:
        top1 = top5 = None
        if images.labels is not None:
            top1, top5 = score(reference.logits, images.labels, embeddings=self._embeddings)
        return Baseline(
            runtime="onnxruntime" if self.model.baseline_path else BASELINE,
            precision=Precision.FP32,
            image_size=self.model.image_size,
            runtime_version=reference.version,
            top1=top1,
            top5=top5,
            latency_ms=timings.latency(BASELINE) if self.timed else None,
            peak_rss_bytes=reference.peak_rss_bytes,
            predictions=None if self._embeddings else PackedIds.pack(predictions(reference.logits)),
        )


def timed(result: Result, timings: Timings) -> Result:
    """The result with what was measured of it; one whose runtime failed meanwhile has failed."""
    if result.name in timings.failed:
        reason = str(timings.failed[result.name])
        return msgspec.structs.replace(result, status="failed", reason=reason)
    if result.name not in timings.rounds:
        return result
    latency = timings.latency(result.name)
    fp16 = result.name.replace(f" {result.precision} ", " fp16 ")
    return msgspec.structs.replace(
        result,
        latency_ms=latency,
        speedup=timings.median_ratio(BASELINE, result.name),
        speedup_vs_fp16=timings.median_ratio(fp16, result.name) if fp16 in timings.rounds else None,
    )


def _run_in_torch(program: Program, images: EvalSet) -> Logits:
    step = 8 if program.dynamic_batch else program.batch_size
    return run_batches(program, fake_quantized(program), Batches(images, step))
