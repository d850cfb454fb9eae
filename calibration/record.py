"""calibration.json: what each layer's input looked like, small enough to be kept beside every report."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec

from vit_export.artifacts import CalibrationRecord, Images, LayerHistogram, Program, Range, Ranges
from vit_export.calibration.histogram import Histogram

if TYPE_CHECKING:
    from torch import Tensor

MOST_BINS = 64
_FINE_BINS = 2048


def record(program: Program, batches: Iterable[Images], ranges: Ranges) -> CalibrationRecord:
    """A histogram of every layer's input over `batches`, float32 [n, 3, H, W], beside its chosen range.

    Layers that read the same tensor are counted once. Memory: one batch and 16 KiB a layer.
    """
    from vit_export.calibration.collect import watch

    seen, images = watch(program, batches, lambda layer: _Counter())
    compact = {id(counter): counter.compact() for counter in seen.values()}
    layers = tuple(
        LayerHistogram(name, ranges.inputs[name].low, ranges.inputs[name].high, *compact[id(counter)])
        for name, counter in seen.items()
    )
    return CalibrationRecord(ranges.method, program.image_size, images, layers)


def encode(found: CalibrationRecord) -> bytes:
    """As JSON, a line a layer at most."""
    return msgspec.json.encode(found) + b"\n"


class _Counter:
    """A histogram and the extremes of what it saw."""

    def __init__(self) -> None:
        self.histogram = Histogram(_FINE_BINS)
        self.seen = Range(math.inf, -math.inf)

    def update(self, values: Tensor, where: str = "") -> None:
        low, high = float(values.min()), float(values.max())
        self.histogram.add(values.float(), max(-low, high))
        self.seen = Range(min(self.seen.low, low), max(self.seen.high, high))

    def compact(self) -> tuple[float, float, tuple[int, ...]]:
        """(first edge, bin width, counts) over the extremes, neighbours joined to at most MOST_BINS."""
        fine, half = self.histogram, self.histogram.bins // 2
        first = max(0, math.floor(self.seen.low / fine.width) + half)
        last = min(fine.bins - 1, math.floor(self.seen.high / fine.width) + half)
        step = -(-(last - first + 1) // MOST_BINS)
        counts = [int(fine.counts[i : i + step].sum()) for i in range(first, last + 1, step)]
        return (first - half) * fine.width, step * fine.width, tuple(counts)
