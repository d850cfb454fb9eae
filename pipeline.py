"""The stages in order, each a function, and `run`, which does all of them.

    model = load("timm:deit_tiny_patch16_224", LoadOptions(pretrained=True))
    program = trace(adapt(model, (192, 192)))
    ranges = calibrate(program, batches(images, 8), MinMaxConfig())
    plan = make_plan(ranges, program.layers)
    artifact = export(program, plan, target_named("onnx"), request)
    result = verify(reference_logits, Runnable("onnx", artifact.path), images, Path("out.npy"))

`run(ExportJob(...))` is what the command line calls.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import msgspec
import torch

from vit_export.artifacts import EvalSet, LoadedModel, Logits, Precision, Runnable
from vit_export.build_size import export
from vit_export.calibration.checks import check_labels
from vit_export.calibration.collect import calibrate
from vit_export.calibration.images import ImageSource
from vit_export.calibration.plan import plan as make_plan
from vit_export.calibration.preprocess import batches, write_pixels
from vit_export.export.program import trace
from vit_export.export.quantize import quantize
from vit_export.export.targets import target_named
from vit_export.job import ExportJob, ImageSources, open_sources
from vit_export.models import adapt, adapt_all, load
from vit_export.models.geometry import show
from vit_export.one_size import OneSize, Outcome
from vit_export.report_extras import draw_attention
from vit_export.runtime import beside, report_files, thumbnails
from vit_export.runtime.accuracy import compare, predictions
from vit_export.runtime.bundle import write_bundle
from vit_export.runtime.costs import Costs
from vit_export.runtime.environment import collect as environment
from vit_export.runtime.inference import predict
from vit_export.runtime.protocol import ProgressCallback
from vit_export.runtime.report_schema import Data, EvalData, ImageData, ModelInfo, PackedIds, Report, Result
from vit_export.runtime.roofline import with_roofline
from vit_export.runtime.verdict import exit_code
from vit_export.search.choices import decided
from vit_export.several_sizes import shared
from vit_export.stages import Stages, silent
from vit_export.store import Store
from vit_export.workspace import CACHE, workspace

__all__ = [
    "adapt", "batches", "calibrate", "exit_code", "export", "load", "make_plan", "predict", "quantize", "run",
    "target_named", "trace", "verify", "write_pixels",
]  # fmt: skip


def run(job: ExportJob, command: str = "", progress: ProgressCallback | None = None) -> Report:
    """Everything an ExportJob asks for; artifacts and report are in job.output when it returns.

    progress: called with (stage, steps done, of). Raises VitExportError for what stops the whole run;
    a target that fails becomes a failed result.
    """
    with Costs(progress or silent) as costs:
        return _run(job, command, costs)


def _run(job: ExportJob, command: str, costs: Costs) -> Report:
    notify = costs.notify
    targets = [target_named(name) for name in job.targets]
    for target in targets:
        target.require()
    stages = _stages(job)
    with workspace(job.output) as work:
        beside.clear(job.output)
        notify(f"download {job.model}" if job.load.pretrained else f"load {job.model}", 0, 1)
        model = load_seeded(job)
        sources = open_sources(job)
        for source in sources.all():
            check_labels(source, model.num_classes)
        outcomes = [
            OneSize(job, adapted, targets, sources, work, notify, stages, native=model).run()
            for adapted in adapt_all(model, job.image_sizes or (model.image_size,), job.adapt)
        ]
        outcomes = shared(job, targets, outcomes, work, notify)
        problems = draw_attention([o.attention for o in outcomes], model.spec, job.output, notify)
        report = report_of(job, command, model, sources, outcomes, problems, stages.reused)
        notify("measure the processor", 0, 1)
        macs = {outcome.baseline.image_size: outcome.program.macs for outcome in outcomes}
        report = with_roofline(report, macs, job.batch_size or 1)
        if job.bundle_images is not None and any(result.artifact for result in report.results):
            notify("bundle", 0, 1)
            carried = [outcome.carried for outcome in outcomes]
            write_bundle(
                report, carried, job.output,
                images=job.bundle_images, batch_size=job.batch_size, zipped=job.zipped,
            )  # fmt: skip
        thumbnails.write(report, [outcome.evaluation for outcome in outcomes], job.output)
        report = msgspec.structs.replace(report, costs=costs.so_far())
        report_files.write(report, job.output)
        if not any(result.status == "failed" for result in report.results):
            shutil.rmtree(job.output / CACHE, ignore_errors=True)
    return report


def load_seeded(job: ExportJob) -> LoadedModel:
    """The job's model; one without trained weights has the same random ones for the same seed."""
    torch.manual_seed(job.seed)
    return load(job.model, job.load_options)


def verify(
    reference: Logits, runnable: Runnable, images: EvalSet, out: Path, *, embeddings: bool = False
) -> Result:
    """Run an artifact in a process of its own and compare its outputs with the baseline's.

    reference: float32 [N, K] of the same images. out: where the outputs are kept (.npy).
    """
    prediction = predict(runnable, images, out)
    accuracy = compare(reference, prediction.logits, images.labels, embeddings=embeddings)
    result = Result(
        target=runnable.runner,
        precision=Precision.FP32,
        image_size=images.preprocessing.size,
        status="ok",
        runtime_version=prediction.version,
        peak_rss_bytes=prediction.peak_rss_bytes,
    )
    return result.with_accuracy(accuracy, None if embeddings else predictions(prediction.logits))


def _stages(job: ExportJob) -> Stages:
    """Where this run keeps its stages and looks for them."""
    if not job.resume:
        return Stages()
    return Stages(Store(job.store)) if job.store else Stages(Store(job.output / CACHE), link=True)


def report_of(
    job: ExportJob,
    command: str,
    model: LoadedModel,
    sources: ImageSources,
    outcomes: Sequence[Outcome],
    problems: tuple[str, ...] = (),
    reused: Sequence[str] = (),
) -> Report:
    """What a run found out, as its report. model: as loaded, or as adapted to the one size there is."""
    first = outcomes[0]
    notes = (*model.notes, f"output: {model.output}", *sources.notes)
    notes += _decisions(outcomes)
    notes += tuple(n for o in outcomes for n in (*o.notes, *o.program.notes, *o.doubts)) + problems
    return Report(
        created=datetime.now(timezone.utc),
        command=command,
        environment=environment(job.threads),
        model=ModelInfo(
            spec=model.spec,
            family=model.family,
            parameters=sum(p.numel() for p in model.module.parameters()),
            num_classes=model.num_classes,
            source_image_size=model.source_image_size,
            preprocessing=first.evaluation.preprocessing,
            preprocessing_sha256=first.evaluation.preprocessing.digest(),
            macs=first.program.macs,
            notes=tuple(dict.fromkeys(notes)),
        ),
        data=Data(
            calib=_image_data(sources.calibration, first.calib) if first.calib else None,
            eval=_eval_data(sources.evaluation, first.evaluation),
        ),
        baseline=first.baseline,
        more_baselines=tuple(outcome.baseline for outcome in outcomes[1:]),
        decisions=first.plan.decisions if first.plan else (),
        sensitivity=first.plan.sensitivity if first.plan else (),
        results=tuple(result for outcome in outcomes for result in outcome.results),
        reused=tuple(reused),
    )


def _decisions(outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    """How int8 was chosen, at which size where there are several."""
    several = len(outcomes) > 1
    sized = [(o, f" at {show(o.baseline.image_size)}" if several else "") for o in outcomes]
    return tuple(f"int8{at}: {decided(o.plan.decisions)}" for o, at in sized if o.plan and o.plan.decisions)


def _image_data(source: ImageSource | None, images: EvalSet) -> ImageData | None:
    if source is None:
        return None
    return ImageData(
        path=source.where, images=images.count, sha256=source.digest(), skipped=len(images.skipped)
    )


def _eval_data(source: ImageSource | None, images: EvalSet) -> EvalData | None:
    if source is None:
        return None
    labels = images.labels
    return EvalData(
        path=source.where,
        images=images.count,
        sha256=source.digest(),
        skipped=len(images.skipped),
        labels=labels is not None,
        label_ids=None if labels is None else PackedIds.pack(labels),
    )
