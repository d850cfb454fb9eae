"""What an export leaves beside the report for its page: histograms of the layers, and attention."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vit_export.artifacts import EvalSet, Precision, Program
from vit_export.attention_job import AttentionJob, try_write
from vit_export.build_size import Calibrated
from vit_export.calibration.preprocess import batches
from vit_export.calibration.record import encode, record
from vit_export.export.quantize import quantize
from vit_export.export.target import Target
from vit_export.job import ExportJob, first_images
from vit_export.runtime.files import write_atomic
from vit_export.runtime.protocol import ProgressCallback

_RECORDED = 8  # calibration images whose histograms the report shows


def record_histograms(known: Calibrated, path: Path, scratch: Path) -> None:
    """Write calibration.json at `path`: what reaches each layer of the program that is quantised."""
    few = first_images(known.images, _RECORDED, scratch)
    step = 8 if known.program.dynamic_batch else known.program.batch_size
    write_atomic(path, encode(record(known.program, batches(few, step), known.ranges)))


def attention_of(
    job: ExportJob,
    program: Program,
    known: Calibrated | None,
    targets: Sequence[Target],
    images: EvalSet,
    scratch: Path,
    *,
    classes: bool,
) -> AttentionJob | None:
    """The first `job.attention` images with the float program and the int8 one of the first target."""
    if not job.attention:
        return None
    few = first_images(images, job.attention, scratch)
    if known is None:
        return AttentionJob(program, None, few, "not shown: int8 was not asked for", classes)
    target, plan = targets[0], known.plan
    quantized = quantize(known.program, plan, target.profile(Precision.INT8, job.options))
    int8 = f"as for {target.name}, {plan.method} on {plan.images} images"
    return AttentionJob(program, quantized, few, int8, classes)


def draw_attention(
    jobs: Sequence[AttentionJob | None], model: str, output: Path, notify: ProgressCallback
) -> tuple[str, ...]:
    """Write OUTPUT/attention where it was asked for; what could not be shown, as notes."""
    asked = [job for job in jobs if job is not None]
    problem = try_write(asked, model, output, notify) if asked else ""
    return (problem,) if problem else ()
