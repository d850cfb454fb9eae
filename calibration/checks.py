"""Doubts about calibration and evaluation images that are better said before anything is quantised."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

from vit_export.artifacts import EvalSet
from vit_export.calibration.images import ImageSource
from vit_export.calibration.preprocess import pixel_batches
from vit_export.errors import InputError

FEW = 16  # images; min-max ranges of ViTs still move below this
OFF_MEAN = 1.5  # |channel mean| after normalisation; natural photos stay below 1
OFF_STD = (0.2, 4.0)  # channel deviation after normalisation; [0, 1] scaled photos have 0.25


def check_labels(source: ImageSource, num_classes: int) -> None:
    """Labels must be classes of the model; 0 classes (an embedding model) takes any.

    Raises InputError when folders are not as many as classes, or an index is outside them.
    """
    if source.labels is None or num_classes == 0:
        return
    if source.classes and len(source.classes) != num_classes:
        raise InputError(
            f"{source.where} has {len(source.classes)} class folders, the model has {num_classes} classes",
            "one sub-folder a class, sorted as its classes are; or, without labels, all images in one folder",
        )
    low, high = int(source.labels.min()), int(source.labels.max())
    if low < 0 or high >= num_classes:
        raise InputError(
            f"labels of {source.where} run from {low} to {high}, the model has {num_classes} classes",
            "labels are class indices from 0",
        )


def inspect(calibration: EvalSet, evaluation: EvalSet | None = None) -> tuple[str, ...]:
    """Sentences about what makes calibration or its judgement doubtful; empty when nothing does.

    Few images, images of one colour, images that are there twice, pixels that stop at 1, channel statistics
    far from what the contract's mean and std promise, and images that are also evaluated on. Images are
    compared as preprocessed, by hash. Reads the pixels in batches.
    """
    found = []
    if calibration.count < FEW:
        found.append(f"only {calibration.count} calibration images; {FEW} or more give steadier ranges")
    known = _hashes(calibration)
    found += _constant(calibration) + _copies(known) + _off_scale(calibration)
    if evaluation is not None:
        found += _overlap(set(known), evaluation)
    return tuple(found)


def _constant(images: EvalSet) -> list[str]:
    flat = sum(
        int((batch == batch[:, :1, :1]).all(axis=(1, 2, 3)).sum()) for batch in pixel_batches(images, 16)
    )
    return [f"{flat} of {images.count} calibration images are of one colour"] if flat else []


def _off_scale(images: EvalSet) -> list[str]:
    """Channel mean and deviation over all pixels, after normalisation, against 0 and 1."""
    total, squares, pixels, highest = np.zeros(3), np.zeros(3), 0, 0
    for batch in pixel_batches(images, 16):
        values = batch.reshape(-1, 3).astype(np.float64)
        total, squares, pixels = total + values.sum(0), squares + (values**2).sum(0), pixels + len(values)
        highest = max(highest, int(batch.max()))
    if highest == 1:
        return ["calibration pixels are 0 and 1 of 0..255: they were scaled to 0..1 before they were saved"]
    contract = images.preprocessing
    raw = total / pixels
    deviation = np.sqrt(np.maximum(squares / pixels - raw**2, 0)) / 255 / contract.std
    mean = (raw / 255 - contract.mean) / contract.std
    if (abs(mean) < OFF_MEAN).all() and (deviation > OFF_STD[0]).all() and (deviation < OFF_STD[1]).all():
        return []
    shown = f"mean {_numbers(mean)}, deviation {_numbers(deviation)}"
    return [f"normalised calibration images have {shown} instead of about 0 and 1: check --mean and --std"]


def _copies(known: list[bytes]) -> list[str]:
    copies = len(known) - len(set(known))
    return [f"{copies} of {len(known)} calibration images are copies of others"] if copies else []


def _overlap(known: set[bytes], evaluation: EvalSet) -> list[str]:
    shared = sum(digest in known for digest in _hashes(evaluation))
    if not shared:
        return []
    return [
        f"{shared} of {evaluation.count} evaluation images are also calibration images: accuracy is flattered"
    ]


def _hashes(images: EvalSet) -> list[bytes]:
    return [blake2b(row.tobytes(), digest_size=16).digest() for b in pixel_batches(images, 16) for row in b]


def _numbers(values: np.ndarray) -> str:
    return "/".join(f"{value:.2f}" for value in values)
