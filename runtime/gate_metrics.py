"""What a gate rule can be about: one line a metric, a function from a comparison to a value.

A metric gives None where the reports do not hold what it needs. A `Reading` may carry an interval (in the
value's units) or a doubt; the gate then does not turn red on what could be chance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from vit_export.errors import InputError
from vit_export.runtime.accuracy import drop_interval
from vit_export.runtime.report_schema import Ids, PackedIds, Report, Result


@dataclass(frozen=True, slots=True)
class Comparison:
    """One result, its report, and the same artifact in the baseline report where there is one."""

    report: Report
    result: Result
    base_report: Report | None = None
    base: Result | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """A value. interval: 95 %, of a loss in points. doubt: why the value may not be comparable."""

    value: float
    interval: tuple[float, float] | None = None
    doubt: str = ""


@dataclass(frozen=True, slots=True)
class Unknown:
    """No value, because its measurement was tried and failed for this reason."""

    reason: str


@dataclass(frozen=True, slots=True)
class Metric:
    """read: None if not measured. relative: needs a baseline report. meaning: for the docs."""

    read: Callable[[Comparison], Reading | Unknown | None]
    relative: bool
    meaning: str


def _field(name: str) -> Callable[[Comparison], Reading | Unknown | None]:
    """A number that the result holds as it is."""

    def read(pair: Comparison) -> Reading | None:
        value: float | None = getattr(pair.result, name)
        return None if value is None else Reading(float(value))

    return read


def _latency(name: str) -> Callable[[Comparison], Reading | Unknown | None]:
    def read(pair: Comparison) -> Reading | None:
        latency = pair.result.latency_ms
        return None if latency is None else Reading(getattr(latency, name), doubt=_unstable(pair))

    return read


def _latency_ratio(name: str) -> Callable[[Comparison], Reading | Unknown | None]:
    def read(pair: Comparison) -> Reading | None:
        here, there = pair.result.latency_ms, pair.base.latency_ms if pair.base else None
        if here is None or there is None:
            return None
        doubt = _other_machine(pair) or _unstable(pair)
        return Reading(getattr(here, name) / getattr(there, name), doubt=doubt)

    return read


def _speedup(pair: Comparison) -> Reading | Unknown | None:
    value, baseline = pair.result.speedup, pair.report.baseline_for(pair.result.image_size)
    if value is not None:
        return Reading(value)
    return (
        Unknown(f"{baseline.name} was not timed: {baseline.reason}") if baseline and baseline.reason else None
    )


def _top1_drop(pair: Comparison) -> Reading | None:
    drop = pair.result.top1_drop
    return None if drop is None else Reading(drop, pair.result.top1_drop_ci95)


def _top1_regression(pair: Comparison) -> Reading | None:
    """Points of top-1 lost since the baseline report, image by image."""
    labels = _labels(pair.report)
    classes = _classes(pair)
    if labels is None or classes is None:
        return None
    now, before = (ids == labels for ids in classes)
    return Reading(100.0 * float(np.mean(before) - np.mean(now)), drop_interval(before, now))


def _changed(pair: Comparison) -> Reading | None:
    classes = _classes(pair)
    return None if classes is None else Reading(float(np.mean(classes[0] != classes[1])))


def _bytes_ratio(pair: Comparison) -> Reading | None:
    here, there = pair.result.bytes, pair.base.bytes if pair.base else None
    return Reading(here / there) if here is not None and there else None


METRICS: Mapping[str, Metric] = {
    "top1": Metric(_field("top1"), False, "share of images classified right"),
    "top5": Metric(_field("top5"), False, "share of images with the label among the five likeliest"),
    "top1_drop": Metric(_top1_drop, False, "points of top-1 lost against FP32"),
    "agreement": Metric(_field("agreement"), False, "share of images with FP32's class"),
    "sqnr_db": Metric(_field("sqnr_db"), False, "signal to quantisation noise of the outputs, dB"),
    "cosine": Metric(_field("cosine"), False, "mean cosine to FP32's outputs"),
    "speedup": Metric(_speedup, False, "times faster than the FP32 baseline"),
    "speedup_vs_fp16": Metric(_field("speedup_vs_fp16"), False, "times faster than fp16 on the same target"),
    "p50_ms": Metric(_latency("p50"), False, "median latency, ms"),
    "p99_ms": Metric(_latency("p99"), False, "99th percentile of latency, ms"),
    "bytes": Metric(_field("bytes"), False, "size of the artifact"),
    "peak_rss_bytes": Metric(_field("peak_rss_bytes"), False, "peak memory of its process"),
    "top1_regression": Metric(_top1_regression, True, "points of top-1 lost since the baseline report"),
    "changed": Metric(_changed, True, "share of images with another class than in the baseline report"),
    "latency_ratio": Metric(_latency_ratio("p50"), True, "median latency over the baseline report's"),
    "p99_ratio": Metric(_latency_ratio("p99"), True, "99th percentile over the baseline report's"),
    "bytes_ratio": Metric(_bytes_ratio, True, "size over the baseline report's"),
}


def _labels(report: Report) -> Ids | None:
    data = report.data.eval
    if data is None or data.label_ids is None:
        return None
    if data.label_ids.count != data.images:
        raise InputError("the report does not hold one label an image")
    return data.label_ids.unpack()


def _classes(pair: Comparison) -> tuple[Ids, Ids] | None:
    """Predicted classes now and in the baseline report. Raises InputError for other images."""
    if pair.base is None or pair.base_report is None:
        return None
    packed: tuple[PackedIds | None, PackedIds | None] = (pair.result.predictions, pair.base.predictions)
    if packed[0] is None or packed[1] is None:
        return None
    ours, theirs = pair.report.data.eval, pair.base_report.data.eval
    if ours is None or theirs is None or ours.sha256 != theirs.sha256:
        raise InputError(
            f"{pair.result.name} was evaluated on other images than in the baseline report",
            "evaluate both on the same --eval images, or leave out the paired rules",
        )
    if not packed[0].count == packed[1].count == ours.images:
        raise InputError(f"{pair.result.name}: the reports do not hold one prediction an image")
    return packed[0].unpack(), packed[1].unpack()


def _unstable(pair: Comparison) -> str:
    timings = (pair.result.latency_ms, pair.base.latency_ms if pair.base else None)
    return "unstable timing" if any(t is not None and t.unstable for t in timings) else ""


def _other_machine(pair: Comparison) -> str:
    """Why latencies of the two reports cannot be divided; empty if they can."""
    if pair.base_report is None:
        return ""
    here, there = pair.report.environment, pair.base_report.environment
    if (here.cpu, here.machine) != (there.cpu, there.machine):
        return f"the baseline ran on another processor ({there.cpu})"
    if here.threads != there.threads:
        return f"the baseline ran with {there.threads} threads, not {here.threads}"
    return ""
