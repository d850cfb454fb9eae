"""Weights of the embedded model with seeded noise on every matrix: a regression for the gate to find.

    python examples/perturb_digits.py worse.safetensors [NOISE]

NOISE is in standard deviations of each matrix; 0.45 costs the digits about four points of top-1.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from vit_export.data import DIGITS_VIT_WEIGHTS


def perturbed(noise: float) -> dict[str, np.ndarray]:
    """Every weight as float32, matrices with `noise` of their own deviation added."""
    rng = np.random.default_rng(0)
    weights = {name: value.astype(np.float32) for name, value in load_file(DIGITS_VIT_WEIGHTS).items()}
    return {
        name: value + noise * value.std() * rng.standard_normal(value.shape, np.float32)
        if value.ndim > 1
        else value
        for name, value in weights.items()
    }


if __name__ == "__main__":
    save_file(perturbed(float(sys.argv[2]) if len(sys.argv) > 2 else 0.45), Path(sys.argv[1]))
