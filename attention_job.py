"""Attention of a model on some images: maps from the traced graph, pictures, attention.json."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from vit_export.artifacts import EvalSet, ImageAttention, LayerAttention, LoadedModel, Precision, Program
from vit_export.build_size import calibrated
from vit_export.calibration.images import SUFFIXES, FolderSource, ImageSource, open_images
from vit_export.calibration.preprocess import pixel_batches, write_pixels
from vit_export.data import DIGITS_IMAGES
from vit_export.errors import TargetError, UsageError
from vit_export.export.attention import attend
from vit_export.export.program import trace
from vit_export.export.quantize import quantize
from vit_export.export.targets import target_named
from vit_export.job import ExportJob
from vit_export.models import DEFAULT, adapt, load
from vit_export.runtime import attention_file
from vit_export.runtime.attention_file import AttentionFile, AttentionImage, AttentionLayer
from vit_export.runtime.attention_pictures import Bytes, Column, sheet
from vit_export.runtime.files import atomic_directory
from vit_export.runtime.protocol import ProgressCallback


@dataclass(frozen=True, slots=True, eq=False)
class AttentionJob:
    """The images of one size, a float program and, where there is one, its quantised form.

    int8: how that was made, or why there is none.
    """

    program: Program
    quantized: Program | None
    images: EvalSet
    int8: str
    classes: bool = True


def run(job: ExportJob, images: Sequence[Path], most: int, notify: ProgressCallback) -> AttentionFile:
    """`vit-export attention`: the attention of a model on `images` (files, folders or .npz) in job.output.

    most: images taken from each folder or .npz. Int8 is calibrated as in an export, for the first target.
    """
    sources = [_open(path, most, job.seed) for path in images or _embedded(job)]
    notify(f"download {job.model}" if job.load.pretrained else f"load {job.model}", 0, 1)
    model = load(job.model, job.load_options)
    model = adapt(model, job.image_sizes[0], job.adapt) if job.image_sizes else model
    notify("trace", 0, 1)
    program = trace(model)
    job.output.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".work-", dir=job.output) as name:
        quantized, int8 = _quantized(job, model, program, Path(name), notify)
        jobs = [
            AttentionJob(
                program, quantized, write_pixels(source, model.preprocessing, Path(name, f"{i}.npy")),
                int8, model.num_classes > 0,
            )
            for i, source in enumerate(sources)
        ]  # fmt: skip
        return write(jobs, model.spec, job.output, notify)


def _embedded(job: ExportJob) -> list[Path]:
    if job.model != DEFAULT:
        raise UsageError("which images?", "vit-export attention --model SPEC photo.jpg ...")
    return [DIGITS_IMAGES]


def _open(path: Path, most: int, seed: int) -> ImageSource:
    if path.is_file() and path.suffix.lower() in SUFFIXES:
        return FolderSource(path.parent, (path.name,))
    return open_images(path, limit=most, seed=seed, split="eval" if path == DIGITS_IMAGES else None)


def _quantized(
    job: ExportJob, model: LoadedModel, program: Program, work: Path, notify: ProgressCallback
) -> tuple[Program | None, str]:
    """The int8 program and how it was made; None and why without calibration images."""
    if job.calib is None and job.model != DEFAULT:
        return None, "not shown: it needs calibration images (--calib)"
    path, split = (job.calib, None) if job.calib else (DIGITS_IMAGES, "calib")
    source = open_images(path, limit=job.calib_size, seed=job.seed, split=split)
    notify("preprocess calib images", 0, len(source))
    pixels = write_pixels(source, model.preprocessing, work / "calib.npy")
    profile = target_named(job.targets[0]).profile(Precision.INT8, job.options)
    known = calibrated(
        job, program, pixels, profile, work / "plan.json", notify, embeddings=model.num_classes == 0
    )
    made = f"as for {job.targets[0]}, {known.plan.method} on {known.plan.images} images"
    return quantize(known.program, known.plan, profile), made


def write(jobs: Sequence[AttentionJob], model: str, output: Path, notify: ProgressCallback) -> AttentionFile:
    """Attend to every image and write OUTPUT/attention, complete or not at all.

    Raises TargetError for a model in whose graph no attention is found.
    """
    with atomic_directory(output / attention_file.FOLDER) as folder:
        total = sum(job.images.count for job in jobs)
        found: list[AttentionImage] = []
        for job in jobs:
            for name, pixels in zip(job.images.names, pixel_batches(job.images, 1), strict=True):
                notify("attention", len(found), total)
                place = folder / _folder_name(len(found), name)
                place.mkdir()
                seen = attend(job.program, job.quantized, job.images.preprocessing.normalize(pixels))
                found.append(_save(job, name, seen, pixels[0], place))
        file = AttentionFile(model=model, int8=jobs[0].int8, images=tuple(found))
        (folder / attention_file.FILE).write_bytes(attention_file.encode(file))
    return file


def _folder_name(index: int, name: str) -> str:
    """`03-cat` for photos/cat.jpg: in order, and safe in any file system and link."""
    stem = re.sub(r"[^0-9A-Za-z_.-]+", "-", Path(name).stem)
    return f"{index:02}-{stem.strip('-')}"


def try_write(jobs: Sequence[AttentionJob], model: str, output: Path, notify: ProgressCallback) -> str:
    """`write` as a side product: what could not be shown, in words, empty when all was."""
    try:
        write(jobs, model, output, notify)
    except TargetError as error:
        return f"attention: {error.message}"
    return ""


def _save(job: AttentionJob, name: str, seen: ImageAttention, pixels: Bytes, place: Path) -> AttentionImage:
    layers = tuple(_layer(i, layer, pixels, place) for i, layer in enumerate(seen.layers))
    means = [_mean(layer) for layer in seen.layers if layer.float_maps is not None]
    rollout = seen.float_rollout
    return AttentionImage(
        name=name,
        image_size=job.program.image_size,
        float_class=int(np.argmax(seen.float_output)) if job.classes else None,
        int8_class=int(np.argmax(seen.int8_output)) if job.classes and seen.int8_output is not None else None,
        layers=layers,
        layers_picture=_picture(means, pixels, place / "layers.png") if means else None,
        rollout_picture=None
        if rollout is None
        else _picture([Column("rollout", rollout, seen.int8_rollout)], pixels, place / "rollout.png"),
        rollout_reason=seen.rollout_reason,
    )


def _layer(index: int, layer: LayerAttention, pixels: Bytes, place: Path) -> AttentionLayer:
    file = place / f"layer-{index:02}-{layer.name.replace('/', '_')}.png"
    return AttentionLayer(
        name=layer.name,
        heads=layer.heads,
        queries=layer.queries,
        keys=layer.keys,
        query=layer.query,
        grid=layer.grid,
        kl=layer.kl,
        picture=None if layer.float_maps is None else _picture(_heads(layer), pixels, file),
        reason=layer.reason,
    )


def _heads(layer: LayerAttention) -> list[Column]:
    """The mean over heads, then each head."""
    assert layer.float_maps is not None
    others = layer.int8_maps if layer.int8_maps is not None else [None] * layer.heads
    pairs = zip(layer.float_maps, others, strict=True)
    return [
        replace(_mean(layer), title="mean"),
        *(Column(f"head {i}", ours, theirs) for i, (ours, theirs) in enumerate(pairs)),
    ]


def _mean(layer: LayerAttention) -> Column:
    assert layer.float_maps is not None
    int8 = None if layer.int8_maps is None else layer.int8_maps.mean(0)
    return Column(layer.name, layer.float_maps.mean(0), int8)


def _picture(columns: Sequence[Column], pixels: Bytes, path: Path) -> str:
    image: Image.Image = sheet(pixels, columns)
    image.save(path, optimize=True)
    return f"{path.parent.name}/{path.name}"
