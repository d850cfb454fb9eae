"""Charts as inline SVG, drawn by pygal (extra `html`): no script, colours from the page's own variables.

A chart never stands alone: its caption, its text alternative and a table beside it say the same. Without
pygal the page is whole but for the pictures.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from vit_export.runtime.html_tree import Node, el
from vit_export.runtime.report_cells import printable

WITHOUT = "Charts are left out: they need  pip install 'vit-export[html]'"
WIDTH = 440  # of the drawing; small enough that its text stays legible on a 360 px screen
_COLOURS = tuple(f"var(--c{i})" for i in range(6))


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar. interval: drawn as a whisker. marked: in the second colour. A value of None leaves a gap."""

    value: float | None
    interval: tuple[float, float] | None = None
    marked: bool = False


@dataclass(frozen=True, slots=True)
class Point:
    """One artifact in the plane; best: no other is both faster and more accurate."""

    name: str
    x: float
    y: float
    best: bool


def available() -> bool:
    """Whether charts can be drawn here."""
    return importlib.util.find_spec("pygal") is not None


def bars(
    labels: Sequence[str], series: Mapping[str, Sequence[Bar]], *, stacked: bool = False
) -> ElementTree.Element:
    """Horizontal bars, a group a label, from the top. Values are printed unless stacked or with whiskers."""
    import pygal

    whiskers = any(bar.interval for values in series.values() for bar in values)
    printed = not stacked and not whiskers
    lines = len(labels) * (1 if stacked else len(series))
    columns = 1 if max(map(len, series)) > 20 else 2
    kind = pygal.HorizontalStackedBar if stacked else pygal.HorizontalBar
    steps = 4 if max(map(len, labels)) < 20 else 2  # long labels leave a narrow axis
    ticks = (
        _ticks(0.0, 100.0) if stacked else _ticks(*_extent(series.values(), 1.2 if printed else 1.0), steps)
    )
    chart = kind(
        **_config(_palette(len(series))),
        height=100 + 24 * lines + 10 * len(labels) + 20 * math.ceil(len(series) / columns),
        legend_at_bottom_columns=columns,
        show_legend=len(series) > 1,
        value_formatter=lambda value: f"{value:.3g}",
        print_values=printed,
        print_values_position="top",  # at the bar's end; report.css lets the text begin there
        range=(ticks[0], ticks[-1]),
        truncate_label=-1,
    )
    chart.x_labels = [_short(label) for label in reversed(labels)]  # pygal counts from the bottom
    chart.y_labels = _labels(ticks)
    for name, values in series.items():
        chart.add(_short(name, 24), [_bar(bar) for bar in reversed(values)])
    return _svg(chart)


def plane(points: Sequence[Point], x: str, y: str) -> ElementTree.Element:
    """Numbered points with a line through the best trade-offs; the numbers are in the legend."""
    import pygal

    xs, ys = _ticks(*_around([p.x for p in points])), _ticks(*_around([p.y for p in points]))
    frontier = sorted((p.x, p.y) for p in points if p.best)
    chart = pygal.XY(
        **_config(("var(--soft)", *_palette(len(points)))),
        height=335 + 20 * len(points),
        x_title=x,
        y_title=y,
        print_labels=True,
        dots_size=5,
        range=(ys[0], ys[-1]),
        xrange=(xs[0], xs[-1]),
        legend_at_bottom_columns=1,
    )
    chart.x_labels, chart.y_labels = _labels(xs), _labels(ys)
    dashes = {"width": 2, "dasharray": "5, 4"}
    chart.add(
        "best trade-offs" if len(frontier) > 1 else None, frontier, show_dots=False, stroke_style=dashes
    )
    for number, point in enumerate(points, 1):
        dot = {"value": (point.x, point.y), "label": str(number)}
        chart.add(f"{number}  {_short(point.name)}", [dot], stroke=False)
    return _svg(chart)


def figure(title: str, caption: str, words: str, drawing: ElementTree.Element) -> Node:
    """A drawing with its caption; `words` is what a screen reader says instead of it."""
    drawing.set("role", "img")
    drawing.set("aria-label", printable(f"{title}. {words}"))
    return el("figure", el("figcaption", el("strong", title), caption), drawing)


def _palette(count: int) -> tuple[str, ...]:
    return (_COLOURS * (1 + count // len(_COLOURS)))[: max(count, 1)]


def _config(palette: Sequence[str]) -> dict[str, Any]:
    from pygal.style import Style

    sizes = ("label", "major_label", "value", "value_label", "legend", "title")
    style = Style(
        background="transparent",
        plot_background="transparent",
        foreground="var(--ink)",
        foreground_strong="var(--ink)",
        foreground_subtle="var(--rule)",
        guide_stroke_color="var(--rule)",
        major_guide_stroke_color="var(--rule)",
        value_colors=("var(--ink)",) * len(palette),
        ci_colors=("var(--ink)",) * len(palette),
        colors=palette,
        font_family='system-ui, "DejaVu Sans", sans-serif',
        opacity="1",
        stroke_opacity="1",
        transition="0s",
        **{f"{part}_font_size": 14 for part in sizes},
    )
    return {
        "style": style, "width": WIDTH, "js": (), "legend_at_bottom": True, "truncate_legend": -1,
        "legend_box_size": 12, "margin": 8, "margin_right": 24,
        "margin_bottom": 28,  # pygal rounds the legend's rows down
    }  # fmt: skip


def _short(text: str, most: int = 40) -> str:
    """A name that leaves room for its bar; the table beside the chart has it whole."""
    safe = printable(text)
    return safe if len(safe) <= most else f"{safe[:4]}…{safe[5 - most :]}"


def _extent(series: Iterable[Sequence[Bar]], room: float) -> tuple[float, float]:
    """Lowest and highest value to show, zero and whiskers included; room: for text at the bars' ends."""
    ends = [0.0]
    for bar in (bar for values in series for bar in values if bar.value is not None):
        ends += [bar.value or 0.0, *(bar.interval or ())]
    return min(ends), max(ends) * room


def _around(values: Sequence[float]) -> tuple[float, float]:
    margin = 0.05 * (max(values) - min(values)) or 0.5
    return min(values) - margin, max(values) + margin


def _ticks(low: float, high: float, steps: int = 4) -> list[float]:
    """Round numbers at about `steps` even steps whose first and last enclose [low, high]."""
    span = (high - low) or 1.0
    power = 10.0 ** math.floor(math.log10(span / steps))
    step = next(
        power * factor for factor in (1, 2, 2.5, 5, 10) if steps * power * factor >= span * (1 - 1e-9)
    )
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * i for i in range(first, max(last, first + 1) + 1)]


def _labels(ticks: Sequence[float]) -> list[dict[str, Any]]:
    return [{"value": tick, "label": f"{tick:.6g}"} for tick in ticks]


def _bar(bar: Bar) -> dict[str, Any] | float | None:
    if bar.marked:
        return {"value": bar.value, "color": _COLOURS[1]}
    if bar.interval is None:
        return bar.value
    low, high = bar.interval
    return {"value": bar.value, "ci": {"low": low, "high": high}}


def _svg(chart: Any) -> ElementTree.Element:
    """pygal's drawing as plain HTML-embedded SVG: without its script, its title and XML namespaces."""
    root = ElementTree.fromstring(chart.render())
    for parent in root.iter():
        for child in list(parent):
            if child.tag.endswith(("}script", "}title", "}desc")):
                parent.remove(child)
    for node in root.iter():
        node.tag = node.tag.rpartition("}")[2]
        node.attrib = {name.rpartition("}")[2]: value for name, value in node.attrib.items()}
    return root
