"""The embedded default: a small ViT trained on real digits, and the images to calibrate and judge it.

`training/train_digits_vit.py`, run from a checkout, made the three files; it is not part of the wheel.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent

DIGITS_VIT_WEIGHTS = _HERE / "digits-vit.safetensors"
"""Weights of `digits-vit`, float16 in the file; load them as float32."""

DIGITS_VIT_CONFIG = _HERE / "digits-vit.json"
"""How to build `digits-vit` and prepare its images; read with `digits_vit_config`."""

DIGITS_IMAGES = _HERE / "digits.npz"
"""`calib_images` [200, 32, 32, 3] and `eval_images` [500, 32, 32, 3] uint8, with `*_labels` int64."""


def digits_vit_config() -> dict[str, Any]:
    """The facts of `digits-vit`: timm_kwargs, preprocessing, classes, parameters, top1, sources."""
    config: dict[str, Any] = json.loads(DIGITS_VIT_CONFIG.read_text(encoding="utf-8"))
    return config
