"""MSE calibration: the range whose 8-bit grid reproduces the values best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vit_export.artifacts import Range
from vit_export.calibration.histogram import Floats, Histogram
from vit_export.errors import UsageError

LEVELS = 255  # steps of an 8-bit grid


@dataclass(frozen=True, slots=True)
class MseConfig:
    """Shrink each end to the multiple of 1/steps of its extreme that gives the least mean squared error
    (Sung et al. 2015; Choukroun et al. 2019, "Low-bit quantization of neural networks").

    bins: of the histogram that stands for the values.  steps: candidates for each end.
    """

    bins: int = 8192
    steps: int = 100
    method: ClassVar[str] = "mse"

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise UsageError(f"{self.steps} MSE steps", "take 2 or more; 100 is usual")


def mse_range(histogram: Histogram, seen: Range, config: MseConfig) -> Range:
    """The best range found by searching high and low in turn until neither moves.

    Only the ends that lie on their own side of zero move, since the grid holds zero anyway.
    """
    filled = np.flatnonzero(histogram.counts)
    centres = np.clip((histogram.edges()[filled] + histogram.width / 2), seen.low, seen.high)
    weights = histogram.counts[filled].astype(np.float64)
    fractions = np.arange(1, config.steps + 1) / config.steps
    lows = min(seen.low, 0.0) * fractions
    highs = max(seen.high, 0.0) * fractions
    low, high = float(lows[-1]), float(highs[-1])
    for _ in range(8):  # two or three rounds are usual
        before = low, high
        high = float(highs[np.argmin([grid_error(centres, weights, low, end) for end in highs])])
        low = float(lows[np.argmin([grid_error(centres, weights, end, high) for end in lows])])
        if (low, high) == before:
            break
    return Range(seen.low if seen.low > 0 else low, seen.high if seen.high < 0 else high)


def grid_error(values: Floats, weights: Floats, low: float, high: float) -> float:
    """Weighted squared error of rounding values to the 256-level grid over [low, high] that holds zero."""
    step = (high - low) / LEVELS
    zero = np.round(-low / step)
    grid = (np.clip(np.round(values / step) + zero, 0, LEVELS) - zero) * step
    return float(np.dot(weights, (values - grid) ** 2))
