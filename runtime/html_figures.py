"""The charts of a report: what is drawn, and the same in words for those who do not see it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vit_export.artifacts import Latency, Size
from vit_export.runtime.html_charts import Bar, Point, bars, figure, plane
from vit_export.runtime.html_tree import Node
from vit_export.runtime.report_cells import milliseconds, number
from vit_export.runtime.report_schema import Baseline, Report, Result


def of_report(report: Report) -> list[Node]:
    """Every chart that the report holds data for."""
    drawn = (latency(report), accuracy(report), trade_offs(report), blame(report))
    return [chart for chart in drawn if chart is not None]


def latency(report: Report) -> Node | None:
    """p50 and p99 of the baselines and of what ran."""
    timed = [
        (name, one.latency_ms, one.speedup if isinstance(one, Result) else None)
        for name, one in _named(report)
        if one.latency_ms is not None
    ]
    if not timed:
        return None
    labels = [name if speed is None else f"{name}, {speed:.2f}x" for name, _, speed in timed]
    series = {
        "p50": [Bar(time.p50) for _, time, _ in timed],
        "p99": [Bar(time.p99) for _, time, _ in timed],
    }
    words = "; ".join(f"{label}: {_times(time)}" for label, (_, time, _) in zip(labels, timed, strict=True))
    return figure("Latency", "Milliseconds for one call; shorter is better.", words, bars(labels, series))


def accuracy(report: Report) -> Node | None:
    """Top-1 points lost, with 95 % intervals; nothing for unlabelled images."""
    names = _names(report)
    known = [(names[id(r)], r) for r in report.results if r.top1_drop is not None]
    if not known:
        return None
    drops = [Bar(result.top1_drop, result.top1_drop_ci95) for _, result in known]
    labels = [f"{name}: {_drop(bar)}" for (name, _), bar in zip(known, drops, strict=True)]
    drawing = bars(labels, {"top-1 drop": drops})
    return figure(
        "Accuracy lost",
        "Top-1 percentage points against FP32 on the same images, with 95 % intervals; positive is worse.",
        "; ".join(labels),
        drawing,
    )


def trade_offs(report: Report) -> Node | None:
    """Accuracy over latency: top-1 where there are labels, else agreement with FP32."""
    field = "top1" if any(result.top1 is not None for result in report.results) else "agreement"
    found = [
        (name, one.latency_ms.p50, value)
        for name, one in _named(report)
        if one.latency_ms and (value := getattr(one, field, None)) is not None
    ]
    if len(found) < 2:
        return None
    points = [Point(name, x, 100 * y, not _beaten((x, y), found)) for name, x, y in found]
    best = ", ".join(point.name for point in points if point.best)
    words = "; ".join(f"{p.name}: {milliseconds(p.x)} ms, {p.y:.1f} %" for p in points)
    axis = "top-1 %" if field == "top1" else "agreement with FP32 %"
    return figure(
        "Accuracy against latency",
        f"Up and to the left is better. Not beaten on both: {best}.",
        words,
        plane(points, "p50 ms", axis),
    )


def blame(report: Report) -> Node | None:
    """The share of each stage in an artifact's error power, 10^(-SQNR/10); resizing is no error."""
    names = _names(report)
    shares = {names[id(r)]: share for r in report.results if (share := error_shares(r))}
    if not shares:
        return None
    stages = dict.fromkeys(stage for share in shares.values() for stage in share)
    series = {stage: [Bar(share.get(stage)) for share in shares.values()] for stage in stages}
    words = "; ".join(
        f"{name}: {', '.join(f'{stage} {part:.0f} %' for stage, part in share.items())}"
        for name, share in shares.items()
    )
    return figure(
        "Which stage to blame",
        "Per cent of the error power that each stage adds, as if stages erred independently.",
        words,
        bars(list(shares), series, stacked=True),
    )


def error_shares(result: Result) -> dict[str, float]:
    """Per cent of the summed error power by stage; empty if no stage erred."""
    errors = (stage for stage in result.stages if stage.stage != "resize")
    power = {s.stage: 0.0 if s.sqnr_db is None else 10 ** (-s.sqnr_db / 10) for s in errors}
    total = sum(power.values())
    return {stage: 100 * part / total for stage, part in power.items()} if total else {}


def _named(report: Report) -> list[tuple[str, Baseline | Result]]:
    names = _names(report)
    ordered: Iterable[Baseline | Result] = (report.baseline, *report.more_baselines, *report.results)
    return [(names[id(one)], one) for one in ordered]


def _names(report: Report) -> dict[int, str]:
    """Short names by identity; the image size is told only where there are several."""
    ordered: tuple[Baseline | Result, ...] = (report.baseline, *report.more_baselines, *report.results)
    several = len({one.image_size for one in ordered}) > 1
    return {id(one): _name(one, one.image_size if several else None) for one in ordered}


def _name(one: Baseline | Result, size: Size | None) -> str:
    runtime = one.runtime if isinstance(one, Baseline) else one.target
    return f"{runtime} {one.precision}" + (f" {size[0]}x{size[1]}" if size else "")


def _beaten(point: tuple[float, float], all_points: Sequence[tuple[str, float, float]]) -> bool:
    """Whether another point is no worse in both and better in one."""
    x, y = point
    return any(a <= x and b >= y and (a, b) != (x, y) for _, a, b in all_points)


def _times(time: Latency) -> str:
    unstable = ", unstable" if time.unstable else ""
    return f"p50 {milliseconds(time.p50)} ms, p99 {milliseconds(time.p99)} ms{unstable}"


def _drop(bar: Bar) -> str:
    bounds = f" [{bar.interval[0]:.1f}, {bar.interval[1]:.1f}]" if bar.interval else ""
    return f"{number(bar.value, '.1f')}{bounds}"
