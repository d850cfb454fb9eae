"""transformers' image processor (preprocessor_config.json) as our preprocessing contract."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vit_export.artifacts import CropMode, Interpolation, Preprocessing, Size

# Pillow's numbers, as transformers stores them.
_RESAMPLE = {
    0: Interpolation.NEAREST,
    1: Interpolation.LANCZOS,
    2: Interpolation.BILINEAR,
    3: Interpolation.BICUBIC,
}
_CLASS_FACTS = (
    "size", "crop_size", "resample", "do_center_crop", "do_normalize", "do_rescale", "rescale_factor",
    "image_mean", "image_std", "crop_pct",
)  # fmt: skip


def preprocessing_of(processor: Mapping[str, Any], size: Size) -> Preprocessing:
    """The contract at the model's `size`; the processor's own size only gives the crop's share.

    processor: the content of preprocessor_config.json. Its keys: size {shortest_edge} or {height, width},
    crop_size, do_center_crop, resample, image_mean, image_std, rescale_factor.
    """
    mean, std = _statistics(processor)
    resize, crop = _side(processor.get("size")), _side(processor.get("crop_size"))
    squash = "shortest_edge" not in (processor.get("size") or {}) and not isinstance(
        processor.get("size"), int
    )
    share = crop / resize if processor.get("do_center_crop") and crop and resize else 1.0
    return Preprocessing(
        size=size,
        mean=mean,
        std=std,
        interpolation=_RESAMPLE.get(int(processor.get("resample") or 0), Interpolation.BILINEAR),
        crop_pct=min(1.0, processor.get("crop_pct") or share),
        crop_mode=CropMode.SQUASH if squash else CropMode.CENTER,
    )


def own_side(processor: Mapping[str, Any]) -> int | None:
    """The side of the images the processor itself makes, where it says so."""
    return _side(processor.get("crop_size") if processor.get("do_center_crop") else processor.get("size"))


def class_facts(processor: type) -> dict[str, Any]:
    """What an image processor class does when no file says otherwise."""
    facts = {name: getattr(processor, name, None) for name in _CLASS_FACTS}
    return {name: value for name, value in facts.items() if value is not None}


def _statistics(
    processor: Mapping[str, Any],
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """mean and std on the 0..1 scale, whatever the processor rescales to."""
    scale = (
        255.0 * (processor.get("rescale_factor") or 1 / 255) if processor.get("do_rescale", True) else 255.0
    )
    normalize = processor.get("do_normalize", True)
    mean = processor.get("image_mean") if normalize else None
    std = processor.get("image_std") if normalize else None
    return _three(mean or 0.0, scale), _three(std or 1.0, scale)


def _three(value: Any, scale: float) -> tuple[float, float, float]:
    red, green, blue = value if isinstance(value, list | tuple) else (value,) * 3
    return red / scale, green / scale, blue / scale


def _side(value: Any) -> int | None:
    """The short side of `224`, `{"shortest_edge": 256}` or `{"height": 224, "width": 224}`."""
    if isinstance(value, Mapping):
        return value.get("shortest_edge") or min(value.get("height", 0), value.get("width", 0)) or None
    return value if isinstance(value, int) else None
