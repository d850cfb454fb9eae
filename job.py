"""What a user asks of one run, and the images that come with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from vit_export.artifacts import EvalSet, Precision, Preprocessing, Size, WeightsOnly
from vit_export.calibration.images import ImageSource, open_images
from vit_export.data import DIGITS_IMAGES
from vit_export.errors import InputError, UsageError
from vit_export.models import DEFAULT
from vit_export.models.config import AdaptConfig, LoadOptions
from vit_export.runtime.verdict import Limits
from vit_export.search.choices import AUTO, Choices

_NOISE_IMAGES = 16
_HELD_OUT = 5  # without --eval, one image in this many is kept from calibration


@dataclass(frozen=True, slots=True)
class ExportJob:
    """One run. Empty image_sizes: the model's own size. calib, evaluation: a path, or as text a URL that
    fsspec opens; None takes what the model brings.

    max_drop: points of top-1; when it is None the default limit informs the verdict but not the exit code.
    batch_size: fixes the batch of the artifacts; None keeps it dynamic and measures at batch 1.
    bundle_images: evaluation images bundle/ carries at most, None for no bundle; zipped: also bundle.zip.
    attention: evaluation images whose attention is drawn.
    tune: seconds to look for the fastest options of CPU artifacts on this machine, None for the defaults.
    throughput: measure images a second over batches and threads.
    options: what only one target understands, by its own names.
    part: evaluate in pieces of so many images, each a stage of its own; a multiple of 32 changes no number.
    resume: reuse finished stages, from `store` (a folder or fsspec URL, kept) or from output/.cache (kept
    until a run ends well).
    """

    model: str = DEFAULT
    load: LoadOptions = field(default_factory=LoadOptions)
    adapt: AdaptConfig = field(default_factory=AdaptConfig)
    image_sizes: tuple[Size, ...] = ()
    targets: tuple[str, ...] = ("onnx",)
    precisions: tuple[Precision, ...] = (Precision.FP32,)
    calib: Path | str | None = None
    calib_size: int = 128
    choices: Choices = AUTO
    evaluation: Path | str | None = None
    eval_size: int | None = None
    keep_float: tuple[str, ...] = ()
    max_drop: float | None = None
    sensitivity: bool = False
    batch_size: int | None = None
    threads: int = 0
    opset: int | None = None
    output: Path = Path("vit-export-out")
    seed: int = 0
    timeout: float = 600.0
    require_run: bool = False
    bundle_images: int | None = 256
    zipped: bool = False
    attention: int = 0
    tune: float | None = None
    throughput: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    resume: bool = True
    store: str | None = None
    part: int | None = None

    @property
    def load_options(self) -> LoadOptions:
        """How to load the model, with the first image size as a hint for one that states none."""
        return self.load if not self.image_sizes else replace(self.load, image_size=self.image_sizes[0])

    @property
    def judges(self) -> bool:
        """Whether calibration looks at what a target makes of the network, or only at the network."""
        tried = self.choices
        judged = tried.open or True in tried.correct_bias
        return judged or self.sensitivity or self.max_drop is not None

    @property
    def weights(self) -> WeightsOnly | None:
        """What of weights alone is quantised (`options["weights"]`), None with activations."""
        wanted: WeightsOnly | None = self.options.get("weights")
        if wanted not in (None, "int8", "int4"):
            raise UsageError(f"unknown --weights {wanted!r}", "int8 or int4")
        return wanted

    @property
    def limits(self) -> Limits:
        """The limits verdicts are judged by."""
        return Limits() if self.max_drop is None else Limits(max_drop=self.max_drop)


@dataclass(frozen=True, slots=True, eq=False)
class ImageSources:
    """Images to calibrate and to judge on; None where there are none. notes: how they were chosen."""

    calibration: ImageSource | None
    evaluation: ImageSource | None
    notes: tuple[str, ...] = ()

    def all(self) -> tuple[ImageSource, ...]:
        """Those that exist."""
        return tuple(source for source in (self.calibration, self.evaluation) if source is not None)


def open_sources(job: ExportJob) -> ImageSources:
    """The images of a job: --calib and --eval, or the embedded digits for the embedded model.

    With --calib alone a fifth of it is kept aside to judge on. Raises UsageError for int8 without
    images, InputError for images that cannot be opened.
    """
    quantised = Precision.INT8 in job.precisions
    if job.model == DEFAULT and job.calib is None and job.evaluation is None:
        calib = open_images(DIGITS_IMAGES, limit=job.calib_size, seed=job.seed, split="calib")
        judged = open_images(DIGITS_IMAGES, limit=job.eval_size, seed=job.seed, split="eval")
        return ImageSources(calib if quantised else None, judged)
    if quantised and job.calib is None:
        raise UsageError(
            "--int8 needs calibration images", "--calib FOLDER (or .npz) of typical inputs, 64 or more"
        )
    evaluation = open_images(job.evaluation, limit=job.eval_size, seed=job.seed) if job.evaluation else None
    if job.calib is None:
        noise = (
            () if evaluation else ("no --eval: compared with the baseline on seeded noise, not on images",)
        )
        return ImageSources(None, evaluation, noise)
    if evaluation is not None:
        return ImageSources(open_images(job.calib, limit=job.calib_size, seed=job.seed), evaluation)
    return _split(open_images(job.calib), job)


def _split(source: ImageSource, job: ExportJob) -> ImageSources:
    """One source cut into calibration and evaluation images that do not overlap."""
    count = len(source)
    if count < 2:
        raise InputError(f"{source.where} has one image", "give more, or --eval with images to judge on")
    aside = min(max(count // _HELD_OUT, count - job.calib_size), job.eval_size or count)
    order = np.random.default_rng(job.seed).permutation(count)
    held, rest = order[:aside], order[aside:]
    calib = source.take(sorted(int(i) for i in rest)).sample(job.calib_size, job.seed)
    evaluation = source.take(sorted(int(i) for i in held))
    note = f"no --eval: judged on {len(evaluation)} images of {source.where} that calibration did not see"
    return ImageSources(calib, evaluation, (note,))


def synthetic_pixels(contract: Preprocessing, folder: Path, seed: int) -> EvalSet:
    """Seeded uniform noise in the place of images: enough to compare numbers, not to judge accuracy."""
    path = folder / f"noise-{contract.size[0]}x{contract.size[1]}.npy"
    shape = (_NOISE_IMAGES, *contract.size, 3)
    np.save(path, np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))
    names = tuple(f"noise {i}" for i in range(_NOISE_IMAGES))
    return EvalSet(
        pixels=path,
        preprocessing=contract,
        count=_NOISE_IMAGES,
        names=names,
        digest=f"noise {seed} {contract.digest()}",
    )


def first_images(images: EvalSet, count: int, path: Path) -> EvalSet:
    """The first `count` images as a set of their own."""
    if count >= images.count:
        return images
    np.save(path, np.load(images.pixels, mmap_mode="r")[:count])
    labels = None if images.labels is None else images.labels[:count]
    return replace(
        images,
        pixels=path,
        count=count,
        labels=labels,
        names=images.names[:count],
        digest=f"first {count} of {images.digest}",
        parts=(),
    )
