"""Accuracy against resolution: a line for every artifact at every image size, so that a user can pick one."""

from __future__ import annotations

from collections.abc import Iterator

from vit_export.artifacts import Latency, Size
from vit_export.runtime.report_cells import NONE, milliseconds, number, shown_size
from vit_export.runtime.report_schema import Baseline, Report, Result

TITLE = "Accuracy against resolution"
CAPTION = "agree and speed are against FP32 PyTorch at the same size"
HEADERS = ("artifact", "size", "top-1", "agree", "p50 ms", "speed")

Line = tuple[str, ...]


def sweep(report: Report) -> tuple[Line, ...]:
    """Lines of HEADERS, artifact by artifact from the smallest size to the largest, the baseline first.

    Empty unless several sizes were judged on images: on noise there is no accuracy to weigh.
    """
    baselines = (report.baseline, *report.more_baselines)
    if report.data.eval is None or len({baseline.image_size for baseline in baselines}) < 2:
        return ()
    return tuple(_baseline_lines(baselines)) + tuple(_result_lines(report.results))


def _baseline_lines(baselines: tuple[Baseline, ...]) -> Iterator[Line]:
    for one in sorted(baselines, key=lambda one: _area(one.image_size)):
        name = f"{one.runtime} {one.precision}"
        yield _line(name, one.image_size, one.top1, None, one.latency_ms, 1.0 if one.latency_ms else None)


def _result_lines(results: tuple[Result, ...]) -> Iterator[Line]:
    order = list(dict.fromkeys((result.target, result.precision) for result in results))
    ran = [result for result in results if result.status == "ok"]
    ran.sort(key=lambda result: (order.index((result.target, result.precision)), _area(result.image_size)))
    for one in ran:
        name = f"{one.target} {one.precision}"
        yield _line(name, one.image_size, one.top1, one.agreement, one.latency_ms, one.speedup)


def _line(
    name: str,
    size: Size,
    top1: float | None,
    agreement: float | None,
    latency: Latency | None,
    speedup: float | None,
) -> Line:
    time = NONE if latency is None else ("~" if latency.unstable else "") + milliseconds(latency.p50)
    speed = NONE if speedup is None else f"{speedup:.2f}x"
    return name, shown_size(size), number(top1, ".3f"), number(agreement, ".3f"), time, speed


def _area(size: Size) -> int:
    return size[0] * size[1]
