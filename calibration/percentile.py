"""Percentile calibration: leave the rarest values outside the range."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vit_export.artifacts import Range
from vit_export.calibration.histogram import Histogram
from vit_export.errors import UsageError


@dataclass(frozen=True, slots=True)
class PercentileConfig:
    """Keep `percentile` % of the values, cutting half of the rest on each side (McKinstry et al. 2018;
    Wu et al. 2020, "Integer quantization for deep learning inference", section 4).

    bins: of the histogram; the answer is exact to one bin, at most 4 / bins of the largest magnitude.
    """

    percentile: float = 99.999  # ONNX Runtime's default; transformers with huge activations want more
    bins: int = 8192
    method: ClassVar[str] = "percentile"

    def __post_init__(self) -> None:
        if not 50 < self.percentile <= 100:
            raise UsageError(f"percentile {self.percentile} is outside 50..100", "99.9 to 99.999 is usual")


def percentile_range(histogram: Histogram, seen: Range, config: PercentileConfig) -> Range:
    """From the lower edge of the bin that holds the low quantile to the upper edge of the high one's.

    The quantiles are order statistics (numpy's `inverted_cdf`); the answer never leaves `seen`.
    """
    share = (100.0 - config.percentile) / 200.0
    below = np.cumsum(histogram.counts)
    total = int(below[-1])
    # Order statistics from each end, so that the cut is the same on both sides.
    rank = max(int(np.ceil(share * total)), 1)
    first = int(np.searchsorted(below, rank))
    last = int(np.searchsorted(below, total - rank + 1))
    edges = histogram.edges()
    return Range(max(float(edges[first]), seen.low), min(float(edges[last + 1]), seen.high))
