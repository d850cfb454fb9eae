"""Observers: streams in any order and in any pieces give the right range from constant memory."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from vit_export.artifacts import Range
from vit_export.calibration.entropy import EntropyConfig
from vit_export.calibration.histogram import Histogram
from vit_export.calibration.mse import MseConfig, grid_error
from vit_export.calibration.observers import (
    METHODS,
    ChannelStats,
    HistogramObserver,
    MinMaxConfig,
    Observer,
    ObserverConfig,
    make_observer,
)
from vit_export.calibration.percentile import PercentileConfig
from vit_export.errors import NumericsError, UsageError

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
TENSORS = arrays(np.float32, array_shapes(max_dims=3, max_side=12), elements=FLOATS)
# Within 2^60 of each other: the histogram's product is exact there.
NORMAL = st.floats(-(2.0**30), 2.0**30, width=32).filter(lambda x: x == 0 or abs(x) > 2.0**-30)
STREAMS = st.lists(arrays(np.float32, st.integers(1, 40), elements=NORMAL), min_size=1, max_size=6)
CONFIGS = [*METHODS.values(), replace(PercentileConfig(), percentile=90.0)]


def observed(config: ObserverConfig, *tensors: np.ndarray) -> Observer:
    observer = make_observer(config)
    for tensor in tensors:
        observer.update(tensor)
    return observer


@given(TENSORS)
def test_minmax_covers_exactly_what_was_seen(values: np.ndarray) -> None:
    """For any finite float32 tensor, denormal and huge included, the range is its extremes."""
    assert observed(MinMaxConfig(), values).range() == Range(float(values.min()), float(values.max()))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.method)
@given(values=TENSORS)
@settings(max_examples=50)
def test_every_method_stays_inside_the_extremes(config: ObserverConfig, values: np.ndarray) -> None:
    """No method fails on a finite tensor, invents values outside it or turns the range around."""
    chosen = observed(config, values).range()
    assert float(values.min()) <= chosen.low <= chosen.high <= float(values.max())


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.method)
@given(streams=STREAMS, split=st.integers(0, 6))
@settings(max_examples=60)
def test_merging_is_observing_both(config: ObserverConfig, streams: list[np.ndarray], split: int) -> None:
    """Two observers merged give the range and the counts of one that saw everything, in either order."""
    whole = observed(config, *streams)
    first, second = observed(config, *streams[:split]), observed(config, *streams[split:])
    reverse = observed(config, *streams[split:])
    reverse.merge(first)
    first.merge(second)
    assert first.range() == whole.range() == reverse.range()
    if isinstance(whole, HistogramObserver) and isinstance(first, HistogramObserver):
        assert first.histogram.exponent == whole.histogram.exponent
        np.testing.assert_array_equal(first.histogram.counts, whole.histogram.counts)


@given(STREAMS)
def test_histogram_counts_every_value_in_its_bin(streams: list[np.ndarray]) -> None:
    """After any growth, each value is counted between the edges that hold it (numpy's own count agrees)."""
    histogram = Histogram(256)
    for values in streams:
        histogram.add(torch.from_numpy(values), float(np.abs(values).max()))
    everything = np.concatenate(streams).astype(np.float64)
    expected = np.histogram(everything, histogram.edges())[0]
    np.testing.assert_array_equal(histogram.counts, expected)


@given(st.integers(0, 2**32 - 1), st.sampled_from([50.5, 90.0, 99.0, 99.9, 99.99, 100.0]))
@settings(max_examples=60)
def test_percentile_is_within_one_bin_of_numpys(seed: int, percentile: float) -> None:
    """Both ends match numpy's order statistics of the full data to one bin, on skewed heavy-tailed data."""
    generator = np.random.default_rng(seed)
    values = (generator.standard_t(2, 5000) + generator.exponential(3, 5000)).astype(np.float32)
    observer = observed(PercentileConfig(percentile), *np.array_split(values, 7))
    assert isinstance(observer, HistogramObserver)
    chosen, width = observer.range(), observer.histogram.width
    tail = (100 - percentile) / 2
    assert abs(chosen.low - np.percentile(values, tail, method="inverted_cdf")) <= width
    high = -np.percentile(-values, tail, method="inverted_cdf")
    assert abs(chosen.high - high) <= width
    assert width <= np.abs(values).max() / 1000


DEGENERATE = {
    "zeros": np.zeros(64, np.float32),
    "constant": np.full(64, 3.25, np.float32),
    "negative constant": np.full(64, -1e-3, np.float32),
    "denormal": np.array([-1e-45, 0, 1e-45, 3e-42], np.float32),
    "huge": np.array([-3.4e38, 0, 3.4e38], np.float32),
    "tiny and huge": np.array([1e-45, 3.4e38], np.float32),
    "one value": np.array([5.0], np.float32),
    "two values": np.array([-1.0, 8.0], np.float32),
    "powers of two": np.array([-8, -4, 4, 8], np.float32),
}


@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_tensors_have_a_finite_range(name: str, config: ObserverConfig) -> None:
    """Zeros, constants, denormals and the largest floats give a finite range inside what was seen."""
    values = DEGENERATE[name]
    chosen = observed(config, values).range()
    assert math.isfinite(chosen.low) and math.isfinite(chosen.high)
    assert values.min() <= chosen.low <= chosen.high <= values.max()
    if values.min() == values.max():
        assert chosen == Range(float(values[0]), float(values[0]))


@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_are_named(config: ObserverConfig, bad: float) -> None:
    """One broken value anywhere is an error that says where; the observer keeps what it had."""
    observer = observed(config, np.array([1.0, 2.0], np.float32))
    with pytest.raises(NumericsError, match="at the input of head"):
        observer.update(np.array([0.5, bad, 1.0], np.float32), "the input of head")
    assert observer.range() == Range(1.0, 2.0)


@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
def test_memory_is_constant(config: ObserverConfig) -> None:
    """A thousand tensors leave no more behind than one: nothing grows with what was seen."""
    observer = make_observer(config)
    sizes = set()
    for seed in range(40):
        values = torch.randn(1000, generator=torch.Generator().manual_seed(seed)) * 2.0**seed
        observer.update(values)
        sizes.add(observer.histogram.counts.nbytes if isinstance(observer, HistogramObserver) else 0)
    assert len(sizes) == 1 and sizes.pop() <= 65536
    assert not any(isinstance(value, torch.Tensor) for value in vars(observer).values())


def test_input_types_give_the_same_range() -> None:
    """numpy, torch, half precision, strided and empty inputs are all read as float32 values."""
    values = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)).half()
    for config in METHODS.values():
        expected = observed(config, values.float().numpy()).range()
        for form in (values, values.float(), values.float().T, values.double().numpy(), values[:, None]):
            observer = make_observer(config)
            observer.update(torch.empty(0, 4))
            observer.update(form)
            assert observer.range() == expected


def test_nothing_observed_has_no_range() -> None:
    """Asking too early is a programming error, not a range of zeros."""
    for config in METHODS.values():
        with pytest.raises(ValueError, match="nothing was observed"):
            make_observer(config).range()


def test_mse_beats_minmax_on_outliers_and_keeps_uniform_data() -> None:
    """A rare outlier is clipped, to a smaller real quantisation error; evenly spread data is not clipped."""
    generator = np.random.default_rng(0)
    values = np.append(generator.normal(size=200_000), [60.0]).astype(np.float32)
    chosen = observed(MseConfig(), values).range()
    exact, weights = values.astype(np.float64), np.ones(len(values))
    error = grid_error(exact, weights, chosen.low, chosen.high)
    assert chosen.high < 60 and error < 0.8 * grid_error(exact, weights, float(values.min()), 60.0)
    uniform = generator.uniform(-2, 5, 100_000).astype(np.float32)
    kept = observed(MseConfig(), uniform).range()
    assert kept.low == pytest.approx(-2, abs=0.05) and kept.high == pytest.approx(5, abs=0.05)


def test_mse_finds_the_best_of_all_pairs() -> None:
    """Searching the ends in turn ends within 1 % of the best pair of a full search on the same grid."""
    values = np.random.default_rng(3).standard_t(3, 50_000).astype(np.float32)
    chosen = observed(MseConfig(steps=25), values).range()
    exact, weights = values.astype(np.float64), np.ones(len(values))
    fractions = np.arange(1, 26) / 25
    lows, highs = values.min() * fractions, values.max() * fractions
    best = min(grid_error(exact, weights, low, high) for low in lows for high in highs)
    assert grid_error(exact, weights, chosen.low, chosen.high) <= 1.01 * best


def test_one_sided_data_keeps_its_far_end() -> None:
    """Data above zero keeps its low end, which no grid with a zero could use anyway."""
    values = np.random.default_rng(0).uniform(2, 3, 1000).astype(np.float32)
    assert observed(MseConfig(), values).range().low == values.min()
    assert observed(MseConfig(), -values).range().high == -values.min()


def test_entropy_clips_a_long_tail_and_keeps_a_bimodal_input() -> None:
    """Threshold near the bulk of a Laplace tail; ink beyond a background spike is not clipped away."""
    generator = np.random.default_rng(0)
    tail = np.append(generator.laplace(size=200_000), [80.0, -80.0]).astype(np.float32)
    assert 5 < observed(EntropyConfig(), tail).range().high < 40
    image = np.concatenate([np.full(60_000, -0.9), generator.uniform(-0.9, 2.0, 40_000)]).astype(np.float32)
    assert observed(EntropyConfig(), image).range().high > 1.9


def test_impossible_settings_are_refused() -> None:
    """Bins, percentile and steps that cannot work are usage errors."""
    for broken in (
        lambda: make_observer(MseConfig(bins=1000)),
        lambda: make_observer(EntropyConfig(bins=64)),
        lambda: PercentileConfig(101),
        lambda: PercentileConfig(50),
        lambda: MseConfig(steps=1),
    ):
        with pytest.raises(UsageError):
            broken()
    with pytest.raises(ValueError, match="cannot merge"):
        observed(MseConfig(), np.ones(3)).merge(observed(EntropyConfig(), np.ones(3)))


@given(st.lists(arrays(np.float32, (3, 4, 5), elements=FLOATS), min_size=1, max_size=4))
def test_channel_statistics_match_numpy(tensors: list[np.ndarray]) -> None:
    """Extremes per channel on either axis, streamed and merged, are numpy's over everything."""
    everything = np.stack(tensors)
    for axis, others in ((-1, (0, 1, 2)), (1, (0, 1, 3))):
        first, second = ChannelStats(axis), ChannelStats(axis)
        for number, tensor in enumerate(tensors):
            (first if number % 2 else second).update(tensor)
        first.merge(second)
        np.testing.assert_array_equal(first.low, everything.min(others))
        np.testing.assert_array_equal(first.high, everything.max(others))
        np.testing.assert_array_equal(first.abs_max(), np.abs(everything).max(others))


def test_channel_statistics_refuse_nan_and_silence() -> None:
    """NaN in one channel is an error; asking before the first tensor is one too."""
    stats = ChannelStats()
    with pytest.raises(ValueError, match="nothing was observed"):
        stats.abs_max()
    with pytest.raises(NumericsError, match="at fc1"):
        stats.update(np.array([[1.0, np.nan]], np.float32), "fc1")
