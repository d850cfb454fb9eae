"""What a caller can say about loading a model and about changing its image size. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vit_export.artifacts import Interpolation, Size
from vit_export.python310 import StrEnum


class PosEmbedMode(StrEnum):
    """How a learned position table is resampled."""

    BICUBIC = "bicubic"
    BILINEAR = "bilinear"
    NEAREST = "nearest"


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How to load a model; None everywhere means the model's own value.

    checkpoint: safetensors or state dict loaded over the architecture. pretrained: download weights.
    mean, std, interpolation, crop_pct: override the model's preprocessing.
    pos_embed, prefix_tokens: settle which parameter of a user's own module is its position table and
    how many of its first rows belong to class, distillation or register tokens.
    image_size: tried first for a user's own module that does not state the size it takes; no more than a
    hint, since a table or a statement in the module says it better.
    """

    checkpoint: Path | None = None
    pretrained: bool = False
    num_classes: int | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    interpolation: Interpolation | None = None
    crop_pct: float | None = None
    trust_remote_code: bool = False
    pos_embed: str | None = None
    prefix_tokens: int | None = None
    image_size: Size | None = None


@dataclass(frozen=True, slots=True)
class AdaptConfig:
    """How positions are carried to a new image size.

    antialias: low-pass before reducing a table (no effect on nearest, little when enlarging).
    pos_embed, prefix_tokens: as in LoadOptions, for a user's own module.
    """

    mode: PosEmbedMode = PosEmbedMode.BICUBIC
    antialias: bool = True
    pos_embed: str | None = None
    prefix_tokens: int | None = None
