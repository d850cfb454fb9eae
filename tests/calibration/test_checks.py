"""Doubts about image sets are said, and only when there is something to say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vit_export.artifacts import EvalSet, Preprocessing
from vit_export.calibration.checks import check_labels, inspect
from vit_export.calibration.images import FolderSource
from vit_export.errors import InputError

CONTRACT = Preprocessing((8, 8))


def photos(count: int, seed: int) -> np.ndarray:
    """uint8 [count, 8, 8, 3] with the statistics of ImageNet photos."""
    values = np.random.default_rng(seed).normal(CONTRACT.mean, CONTRACT.std, (count, 8, 8, 3))
    return np.clip(values * 255, 0, 255).astype(np.uint8)


def saved(folder: Path, name: str, pixels: np.ndarray, contract: Preprocessing = CONTRACT) -> EvalSet:
    np.save(folder / f"{name}.npy", pixels)
    return EvalSet(folder / f"{name}.npy", contract, len(pixels))


def test_good_sets_raise_no_doubt(tmp_path: Path) -> None:
    """Enough different photos, normalised as they should be and not evaluated on: nothing is said."""
    assert inspect(saved(tmp_path, "c", photos(16, 0)), saved(tmp_path, "e", photos(40, 1))) == ()


def test_too_few_images(tmp_path: Path) -> None:
    """Fifteen images are said to be few."""
    (said,) = inspect(saved(tmp_path, "c", photos(15, 0)))
    assert said.startswith("only 15 calibration images")


def test_images_of_one_colour(tmp_path: Path) -> None:
    """Black, and any single colour, is counted; a picture with one odd pixel is not."""
    pixels = photos(20, 0)
    pixels[3], pixels[7] = 0, (10, 200, 30)
    pixels[9] = 77
    pixels[9, 4, 4, 1] = 78
    (said,) = inspect(saved(tmp_path, "c", pixels))
    assert said == "2 of 20 calibration images are of one colour"


def test_copies_are_counted(tmp_path: Path) -> None:
    """The same picture again tells calibration nothing: every further one is a copy."""
    pixels = photos(20, 0)
    pixels[[5, 6, 19]] = pixels[0]
    (said,) = inspect(saved(tmp_path, "c", pixels))
    assert said == "3 of 20 calibration images are copies of others"


def test_pixels_that_were_scaled_before(tmp_path: Path) -> None:
    """Pictures in 0..1 cast to bytes are black to the network: what happened is said, not only a mean."""
    (said,) = inspect(saved(tmp_path, "c", (photos(20, 0) / 255).round().astype(np.uint8)))
    assert said.startswith("calibration pixels are 0 and 1 of 0..255")


@pytest.mark.parametrize(
    "wrong",
    [
        {"mean": (123.7, 116.3, 103.5), "std": (58.4, 57.1, 57.4)},
        {"mean": (0.0, 0.0, 0.0), "std": (0.05, 0.05, 0.05)},
        {"std": (1 / 255, 1 / 255, 1 / 255)},
        {"std": (0.229, 0.224, 9.0)},
    ],
)
def test_wrong_normalisation(tmp_path: Path, wrong: dict[str, tuple[float, float, float]]) -> None:
    """A mean on the 0..255 scale, a std off by a factor and one wrong channel are noticed."""
    (said,) = inspect(saved(tmp_path, "c", photos(20, 0), replace(CONTRACT, **wrong)))  # type: ignore[arg-type]
    assert "check --mean and --std" in said


@pytest.mark.parametrize(
    "usual",
    [
        {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
        {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)},
        {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)},
    ],
)
def test_usual_normalisations_pass(tmp_path: Path, usual: dict[str, tuple[float, float, float]]) -> None:
    """Inception's, plain 0..1 and CLIP's normalisation of photos raise no doubt."""
    assert inspect(saved(tmp_path, "c", photos(20, 0), replace(CONTRACT, **usual))) == ()  # type: ignore[arg-type]


def test_overlap_is_found_by_content(tmp_path: Path) -> None:
    """Three evaluation images that are calibration pixels are counted, wherever they stand."""
    calibration, evaluation = photos(20, 0), photos(50, 1)
    evaluation[[4, 20, 49]] = calibration[[19, 2, 0]]
    (said,) = inspect(saved(tmp_path, "c", calibration), saved(tmp_path, "e", evaluation))
    assert said.startswith("3 of 50 evaluation images are also calibration images")


def labelled(labels: list[int], classes: tuple[str, ...] = ()) -> FolderSource:
    return FolderSource(
        Path("photos"), tuple(map(str, range(len(labels)))), np.array(labels, np.int64), classes
    )


def test_labels_must_be_classes_of_the_model() -> None:
    """Too many folders, too few folders and indices out of range are input errors; fitting labels are not."""
    check_labels(labelled([0, 9, 3]), 10)
    check_labels(labelled([0, 1], ("a", "b")), 2)
    with pytest.raises(InputError, match="2 class folders, the model has 10 classes"):
        check_labels(labelled([0, 1], ("a", "b")), 10)
    with pytest.raises(InputError, match="3 class folders, the model has 2"):
        check_labels(labelled([0, 1], ("a", "b", "c")), 2)
    for labels in ([0, 10], [-1, 3]):
        with pytest.raises(InputError, match=f"from {labels[0]} to {labels[1]}"):
            check_labels(labelled(labels), 10)


def test_no_labels_or_no_classes_is_fine() -> None:
    """Unlabelled images and embedding models have nothing to compare."""
    check_labels(FolderSource(Path("photos"), ("a.png",)), 10)
    check_labels(labelled([0, 77]), 0)
