"""Observers: what a stream of activations is reduced to, and the range that is chosen from it.

An observer holds a fixed amount of memory however many tensors it sees. Its config's type says which
observer is meant; `OBSERVERS` is the only table.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from vit_export.artifacts import Range
from vit_export.calibration.entropy import EntropyConfig, entropy_range
from vit_export.calibration.histogram import Histogram
from vit_export.calibration.mse import MseConfig, mse_range
from vit_export.calibration.percentile import PercentileConfig, percentile_range
from vit_export.errors import NumericsError

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self


@dataclass(frozen=True, slots=True)
class MinMaxConfig:
    """Cover everything that was seen (Jacob et al. 2018, section 3, without the moving average)."""

    method: ClassVar[str] = "minmax"


ObserverConfig = MinMaxConfig | PercentileConfig | MseConfig | EntropyConfig


class Observer(ABC):
    """Watches tensors and answers with the range that quantisation should cover.

    low, high: the exact extremes seen, float32 values; inf and -inf before the first.
    """

    def __init__(self) -> None:
        self.low, self.high = math.inf, -math.inf

    def update(self, values: Tensor | npt.NDArray[Any], where: str = "the tensor") -> None:
        """Take in a tensor of any shape and float type, read as float32; an empty one changes nothing.

        Raises NumericsError, naming `where`, for NaN or Inf.
        """
        import torch

        tensor = torch.as_tensor(values).to(torch.float32)
        if tensor.numel() == 0:
            return
        low, high = (float(extreme) for extreme in torch.aminmax(tensor))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise NumericsError(f"NaN or Inf at {where}", "look for broken weights or an overflow before it")
        self._update(tensor, max(-low, high))
        self.low, self.high = min(self.low, low), max(self.high, high)

    def merge(self, other: Self) -> None:
        """Become what one observer would be that had seen both streams; the other stays as it is."""
        self._merge(other)
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)

    def range(self) -> Range:
        """The chosen range, inside the extremes. Raises ValueError before the first value."""
        if self.low > self.high:
            raise ValueError("nothing was observed")
        return self._range()

    @abstractmethod
    def _update(self, tensor: Tensor, magnitude: float) -> None: ...

    @abstractmethod
    def _merge(self, other: Self) -> None: ...

    @abstractmethod
    def _range(self) -> Range: ...


class MinMaxObserver(Observer):
    """The extremes, nothing else."""

    def _update(self, tensor: Tensor, magnitude: float) -> None: ...

    def _merge(self, other: Self) -> None: ...

    def _range(self) -> Range:
        return Range(self.low, self.high)


class HistogramObserver(Observer):
    """Counts values in a growing histogram; `choose` picks the range from it when asked."""

    def __init__(self, bins: int, choose: Callable[[Histogram, Range], Range]) -> None:
        super().__init__()
        self.histogram = Histogram(bins)
        self._choose = choose

    def _update(self, tensor: Tensor, magnitude: float) -> None:
        self.histogram.add(tensor, magnitude)

    def _merge(self, other: Self) -> None:
        self.histogram.merge(other.histogram)

    def _range(self) -> Range:
        if self.low == self.high:
            return Range(self.low, self.high)
        return self._choose(self.histogram, Range(self.low, self.high))


OBSERVERS: Mapping[type[ObserverConfig], Callable[[Any], Observer]] = {
    MinMaxConfig: lambda config: MinMaxObserver(),
    PercentileConfig: lambda config: HistogramObserver(
        config.bins, lambda histogram, seen: percentile_range(histogram, seen, config)
    ),
    MseConfig: lambda config: HistogramObserver(
        config.bins, lambda histogram, seen: mse_range(histogram, seen, config)
    ),
    EntropyConfig: lambda config: HistogramObserver(
        config.bins, lambda histogram, seen: entropy_range(histogram, seen, config)
    ),
}

METHODS: Mapping[str, ObserverConfig] = {
    config.method: config for config in (MinMaxConfig(), PercentileConfig(), MseConfig(), EntropyConfig())
}
"""The names of `--calib-method` and the config each stands for."""


def make_observer(config: ObserverConfig) -> Observer:
    """A fresh observer for this config."""
    return OBSERVERS[type(config)](config)


class ChannelStats:
    """The extremes of each channel, as channel smoothing needs them (Xiao et al. 2022, SmoothQuant).

    axis: the channel axis of the tensors: -1 after a LayerNorm, 1 before a convolution.
    low, high: float32 [C], None before the first tensor. rows: how many values of each channel were seen.
    """

    def __init__(self, axis: int = -1) -> None:
        self.axis = axis
        self.rows = 0
        self.low: npt.NDArray[np.float32] | None = None
        self.high: npt.NDArray[np.float32] | None = None

    def update(self, values: Tensor | npt.NDArray[Any], where: str = "the tensor") -> None:
        """Take in a tensor with C channels on `axis`. Raises NumericsError for NaN or Inf."""
        import torch

        tensor = torch.as_tensor(values).to(torch.float32).movedim(self.axis, -1)
        if tensor.numel() == 0:
            return
        extremes = torch.aminmax(tensor.reshape(-1, tensor.shape[-1]), dim=0)
        low, high = extremes.min.numpy(), extremes.max.numpy()
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise NumericsError(f"NaN or Inf at {where}", "look for broken weights or an overflow before it")
        self.rows += tensor.numel() // tensor.shape[-1]
        self._join(low, high)

    def merge(self, other: ChannelStats) -> None:
        """Become the statistics of both streams."""
        if other.low is not None and other.high is not None:
            self.rows += other.rows
            self._join(other.low, other.high)

    def abs_max(self) -> npt.NDArray[np.float32]:
        """The largest magnitude of each channel, float32 [C]. Raises ValueError before the first tensor."""
        if self.low is None or self.high is None:
            raise ValueError("nothing was observed")
        return np.maximum(-self.low, self.high)

    def _join(self, low: npt.NDArray[np.float32], high: npt.NDArray[np.float32]) -> None:
        self.low = low.copy() if self.low is None else np.minimum(self.low, low)
        self.high = high.copy() if self.high is None else np.maximum(self.high, high)
