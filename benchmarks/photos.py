"""Real photographs for benchmarks: seeded crops of what scikit-image and scikit-learn ship.

    python benchmarks/photos.py OUT        # OUT/calib (64), OUT/probe and OUT/eval (a folder a photograph)

Calibration crops come from other photographs than evaluation crops. Evaluation classes are the
photographs themselves: crops of 40 to 120 pixels, small enough that telling them apart is not trivial.
`probe` holds crops of the evaluation photographs for fitting a linear probe; calibration never sees them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

CALIBRATION = (
    "astronaut",
    "coffee",
    "motorcycle_left",
    "retina",
    "grass",
    "hubble_deep_field",
    "china",
    "brick",
)
EVALUATION = (
    "chelsea",
    "rocket",
    "camera",
    "ihc",
    "gravel",
    "coins",
    "moon",
    "flower",
    "motorcycle_right",
    "cell",
)
SIZE = 224


def photograph(name: str) -> Image.Image:
    """One photograph by its file's stem, as RGB."""
    import skimage
    import sklearn.datasets

    folders = (Path(skimage.__file__).parent / "data", Path(sklearn.datasets.__file__).parent / "images")
    (path,) = (p for folder in folders for p in folder.glob(f"{name}.*") if p.suffix in (".png", ".jpg"))
    return Image.open(path).convert("RGB")


def crops(
    image: Image.Image, count: int, sides: tuple[int, int], rng: np.random.Generator
) -> list[Image.Image]:
    """Seeded square crops with a side in `sides`, half of them mirrored, resized to SIZE."""
    made = []
    for _ in range(count):
        side = int(rng.integers(sides[0], min(sides[1], *image.size) + 1))
        left, top = (int(rng.integers(0, extent - side + 1)) for extent in image.size)
        crop = image.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        made.append(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop)
    return made


def write(out: Path, *, calib: int = 64, each: int = 40) -> None:
    """Write all three sets as PNG files."""
    rng = np.random.default_rng(0)
    for index, name in enumerate(CALIBRATION):
        share = calib // len(CALIBRATION) + (index < calib % len(CALIBRATION))
        _save(out / "calib", name, crops(photograph(name), share, (96, 400), rng))
    for name in EVALUATION:
        photo = photograph(name)
        _save(out / "probe" / name, name, crops(photo, each, (40, 120), rng))
        _save(out / "eval" / name, name, crops(photo, each, (40, 120), rng))


def _save(folder: Path, name: str, images: list[Image.Image]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        image.save(folder / f"{name}-{index:03}.png")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
