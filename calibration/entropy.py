"""Entropy calibration: the clipping threshold that loses the least information."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vit_export.artifacts import Range
from vit_export.calibration.histogram import Counts, Histogram

LEVELS = 256  # of an 8-bit grid
STRIDE = 16  # bins between candidate thresholds


@dataclass(frozen=True, slots=True)
class EntropyConfig:
    """Least Kullback-Leibler divergence between the values and their 8-bit version (Migacz 2017, "8-bit
    inference with TensorRT", GTC), on signed values: folded onto magnitudes, as first published, one side's
    bulk can hide that the other side is clipped.

    bins: of the histogram.
    """

    bins: int = 4096
    method: ClassVar[str] = "entropy"


def entropy_range(histogram: Histogram, seen: Range, config: EntropyConfig) -> Range:
    """[-t, t] for the best threshold t, cut to `seen`; equally good thresholds: the smallest."""
    half = histogram.bins // 2
    filled = np.flatnonzero(histogram.counts)
    used = max(half - int(filled[0]), int(filled[-1]) + 1 - half)
    candidates = [*range(LEVELS // 2, used, STRIDE), used]
    best = min(candidates, key=lambda reach: divergence(histogram.counts, reach))
    threshold = best * histogram.width
    return Range(max(seen.low, -threshold), min(seen.high, threshold))


def divergence(counts: Counts, reach: int) -> float:
    """KL divergence of keeping `reach` bins on each side of zero and merging them into 256 levels.

    Counts beyond the threshold join the outermost bins of the reference, not of the quantised version; each
    level's count is spread evenly over those of its bins that are not empty.
    """
    half = len(counts) // 2
    inside = counts[half - reach : half + reach].astype(np.float64)
    reference = inside.copy()
    reference[0] += counts[: half - reach].sum()
    reference[-1] += counts[half + reach :].sum()
    levels = min(LEVELS, 2 * reach)
    starts = np.arange(levels) * 2 * reach // levels
    filled = np.add.reduceat((inside > 0).astype(np.float64), starts)
    level = np.add.reduceat(inside, starts) / np.maximum(filled, 1)
    quantized = np.repeat(level, np.diff(starts, append=2 * reach)) * (inside > 0)
    if not quantized.any():
        return float("inf")
    p = reference / reference.sum()
    q = np.maximum(quantized / quantized.sum(), 1e-12)  # clipped counts may stand on an empty bin
    kept = p > 0
    return float(np.sum(p[kept] * np.log(p[kept] / q[kept])))
