"""A histogram of constant size over values whose range is not known in advance."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vit_export.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_SMALLEST = -100  # exponent of the narrowest histogram; smaller values share its two middle bins
_CHUNK = 1 << 18  # values counted at a time: their indices stay in the cache


class Histogram:
    """Counts of values in `bins` equal bins over [-2**exponent, 2**exponent).

    When a value does not fit, the range doubles and each pair of neighbouring bins becomes one. All edges are
    powers of two times integers, so a bin's edges stay edges: growing, merging and counting in another
    order give the same counts. bins is a power of two.
    """

    def __init__(self, bins: int) -> None:
        if bins < 256 or bins & (bins - 1):
            raise UsageError(f"{bins} histogram bins", "take a power of two, 256 or more")
        self.bins = bins
        self.exponent = _SMALLEST
        self.counts: Counts = np.zeros(bins, np.int64)

    @property
    def width(self) -> float:
        """Of one bin."""
        return math.ldexp(2.0 / self.bins, self.exponent)

    def edges(self) -> Floats:
        """The bins + 1 edges, ascending."""
        return np.arange(-self.bins // 2, self.bins // 2 + 1, dtype=np.float64) * self.width

    def add(self, values: Tensor, magnitude: float) -> None:
        """Count float32 values of any shape; `magnitude` is the largest absolute one."""
        import torch

        self._grow(math.frexp(magnitude)[1] if magnitude else _SMALLEST)
        flat, scale, half = values.flatten(), 1.0 / self.width, self.bins // 2
        for part in torch.tensor_split(flat, -(-flat.numel() // _CHUNK)):
            # The product is exact (a power of two) and so is floor: no value lands in its neighbour's bin.
            index = part.mul(scale).floor_().add_(half).to(torch.int32)
            self.counts += torch.bincount(index, minlength=self.bins).numpy()

    def merge(self, other: Histogram) -> None:
        """Add the counts of another histogram with as many bins; the other stays as it is."""
        if other.bins != self.bins:
            raise ValueError(f"cannot merge {other.bins} bins into {self.bins}")
        self._grow(other.exponent)
        np.add.at(self.counts, other._bins_at(self.exponent), other.counts)

    def _grow(self, exponent: int) -> None:
        if exponent <= self.exponent:
            return
        grown: Counts = np.zeros_like(self.counts)
        np.add.at(grown, self._bins_at(exponent), self.counts)
        self.counts, self.exponent = grown, exponent

    def _bins_at(self, exponent: int) -> npt.NDArray[Any]:
        """The bin that each bin falls into in a histogram with this larger exponent."""
        half = self.bins // 2
        return ((np.arange(self.bins) - half) >> min(exponent - self.exponent, 62)) + half
