"""From a decoded image to the uint8 pixels every runtime is given: Pillow and numpy, on every machine.

The arithmetic of sizes is timm's evaluation transform (`timm.data.create_transform(is_training=False)`,
itself torchvision's `Resize` and `CenterCrop`), so a model sees the pixels it was evaluated with.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from PIL import Image

from vit_export.artifacts import CropMode, Interpolation, Preprocessing, Size

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
    """
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    height, width = resized_size((rgb.height, rgb.width), contract)
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
        return tuple(goal[0] if side == short else int(goal[0] * side / short) for side in source)  # type: ignore[return-value]
    ratio = min(source[0] / goal[0], source[1] / goal[1])  # timm's ResizeKeepRatio: rounded
    return round(source[0] / ratio), round(source[1] / ratio)


def _offset(resized: int, crop: int) -> int:
    """Where the crop starts on one axis; negative where black is added (torchvision's rounding)."""
    return round((resized - crop) / 2) if resized >= crop else -((crop - resized) // 2)


