"""From a decoded image to the uint8 pixels every runtime is given: Pillow and numpy, on every machine.

The arithmetic of sizes is timm's evaluation transform (`timm.data.create_transform(is_training=False)`,
itself torchvision's `Resize` and `CenterCrop`), so a model sees the pixels it was evaluated with.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy
from PIL import Image

from vit_export.artifacts import CropMode, EvalSet, Images, Interpolation, Labels, Pixels, Preprocessing, Size
from vit_export.calibration.images import MAX_PIXELS, BadImage, ImageSource
from vit_export.errors import InputError

MAX_BAD = 0.05  # share of images that may be unreadable

RESAMPLING = {
    Interpolation.NEAREST: Image.Resampling.NEAREST,
    Interpolation.BILINEAR: Image.Resampling.BILINEAR,
    Interpolation.BICUBIC: Image.Resampling.BICUBIC,
    Interpolation.LANCZOS: Image.Resampling.LANCZOS,
}


def to_pixels(image: Image.Image, contract: Preprocessing) -> npt.NDArray[np.uint8]:
    """Resize and centre-crop an image to the contract's size: uint8 [H, W, 3], RGB, 0..255.

    CENTER keeps the aspect and loses what sticks out; SQUASH scales each side on its own. Where a side
    ends up smaller than the crop (crop_pct above 1), black is added, as torchvision does.

    Raises BadImage for a strip so long that its resized form would be huge.
    """
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    height, width = resized_size((rgb.height, rgb.width), contract)
    if height * width > MAX_PIXELS:
        raise BadImage(f"{rgb.width}x{rgb.height} would be resized to {width}x{height}")
    if (height, width) != (rgb.height, rgb.width):
        rgb = rgb.resize((width, height), RESAMPLING[contract.interpolation])
    top, left = _offset(height, contract.size[0]), _offset(width, contract.size[1])
    cropped = rgb.crop((left, top, left + contract.size[1], top + contract.size[0]))
    return np.asarray(cropped, np.uint8)


def resized_size(source: Size, contract: Preprocessing) -> Size:
    """(height, width) an image of size `source` is resized to before the crop."""
    goal = tuple(math.floor(side / contract.crop_pct) for side in contract.size)
    if contract.crop_mode is CropMode.SQUASH:
        return goal[0], goal[1]
    if goal[0] == goal[1]:  # torchvision's Resize(int): the long side is truncated
        short = min(source)
        height, width = (goal[0] if side == short else int(goal[0] * side / short) for side in source)
        return height, width
    ratio = min(source[0] / goal[0], source[1] / goal[1])  # timm's ResizeKeepRatio: rounded
    return round(source[0] / ratio), round(source[1] / ratio)


def _offset(resized: int, crop: int) -> int:
    """Where the crop starts on one axis; negative where black is added (torchvision's rounding)."""
    return round((resized - crop) / 2) if resized >= crop else -((crop - resized) // 2)


def write_pixels(
    source: ImageSource,
    contract: Preprocessing,
    path: Path,
    *,
    progress: Callable[[int], None] | None = None,
) -> EvalSet:
    """Preprocess every image of a source into `path`, a .npy of uint8 [N, H, W, 3], one image at a time.

    Broken images are left out, with their labels, and named in `skipped`. The file appears whole or not
    at all. progress: called with the number of images done.

    Raises InputError when more than 5 % of the images are broken.
    """
    good: list[int] = []
    bad: dict[int, BadImage] = {}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            _write_header(file, len(source), contract)
            for index, image in enumerate(source.images()):
                try:
                    if isinstance(image, BadImage):
                        raise image
                    file.write(to_pixels(image, contract).tobytes())
                    good.append(index)
                except BadImage as problem:
                    bad[index] = problem
                if progress is not None:
                    progress(index + 1)
            _check_bad(source, bad)
            _write_header(file, len(good), contract)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return EvalSet(
        pixels=path,
        preprocessing=contract,
        count=len(good),
        labels=None if source.labels is None else source.labels[good],
        names=tuple(source.names[index] for index in good),
        skipped=tuple(f"{source.names[index]}: {problem}" for index, problem in bad.items()),
    )


def pixel_batches(images: EvalSet, batch_size: int) -> Iterator[Pixels]:
    """The stored pixels, uint8 [n, H, W, 3] with n <= batch_size, read from the file as they are asked for.

    Plain reads instead of a memory map, whose pages would count as this process's memory.
    """
    with images.pixels.open("rb") as file:
        shape = _read_header(file, images)
        for start in range(0, images.count, batch_size):
            count = min(batch_size, images.count - start)
            yield np.fromfile(file, np.uint8, count * math.prod(shape)).reshape(count, *shape)


def _read_header(file: IO[bytes], images: EvalSet) -> tuple[int, int, int]:
    """The shape of one image, with the file at the first. Raises InputError for another file's contents."""
    height, width = images.preprocessing.size
    version = npy.read_magic(file)
    stored, _, dtype = npy.read_array_header_1_0(file)
    if version != (1, 0) or dtype != np.uint8 or stored != (images.count, height, width, 3):
        raise InputError(
            f"{images.pixels} is {dtype} {list(stored)}, not {images.count} of {height}x{width}x3"
        )
    return height, width, 3


def batches(images: EvalSet, batch_size: int) -> Iterator[Images]:
    """The images as the network takes them: normalised float32 [n, 3, H, W] with n <= batch_size."""
    for pixels in pixel_batches(images, batch_size):
        yield images.preprocessing.normalize(pixels)


class Batches:
    """Images as a network takes them, read from their file whenever they are asked for.

    Iterating gives normalised float32 [n, 3, H, W] with n <= size, as often as wanted; memory holds one.
    """

    def __init__(self, images: EvalSet, size: int, chosen: Sequence[int] | None = None) -> None:
        self.images, self.size = images, size
        self._chosen = range(images.count) if chosen is None else chosen

    @property
    def count(self) -> int:
        """How many images there are."""
        return len(self._chosen)

    @property
    def labels(self) -> Labels | None:
        """int64 [count], None where the images have none."""
        return None if self.images.labels is None else self.images.labels[list(self._chosen)]

    def __iter__(self) -> Iterator[Images]:
        with self.images.pixels.open("rb") as file:
            shape = _read_header(file, self.images)
            first, length = file.tell(), math.prod(shape)
            for start in range(0, self.count, self.size):
                part = self._chosen[start : start + self.size]
                pixels = np.empty((len(part), *shape), np.uint8)
                for row, index in zip(pixels, part, strict=True):
                    file.seek(first + index * length)
                    row[:] = np.fromfile(file, np.uint8, length).reshape(shape)
                yield self.images.preprocessing.normalize(pixels)

    def take(self, places: Iterable[int]) -> Batches:
        """The images at these places, in this order."""
        return Batches(self.images, self.size, [self._chosen[place] for place in places])


def _write_header(file: IO[bytes], count: int, contract: Preprocessing) -> None:
    """Write or overwrite the .npy header; numpy pads it so that every count takes the same room."""
    file.seek(0)
    shape = (count, *contract.size, 3)
    npy.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


def _check_bad(source: ImageSource, bad: Mapping[int, BadImage]) -> None:
    if len(bad) > MAX_BAD * len(source):
        index, problem = next(iter(bad.items()))
        raise InputError(
            f"{len(bad)} of {len(source)} images in {source.where} cannot be read",
            f"the first: {source.names[index]}: {problem}",
        )
