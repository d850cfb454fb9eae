"""comparison.html: several reports on one page."""

from __future__ import annotations

from collections.abc import Sequence

from vit_export.runtime.comparison import HEADERS, Group, Run, doubts, groups, p50, rows
from vit_export.runtime.html_charts import WITHOUT, Bar, available, bars, figure
from vit_export.runtime.html_tree import Child, Node, badge, el, items, page, section, table
from vit_export.runtime.report_cells import join, milliseconds, number
from vit_export.runtime.report_html import summary
from vit_export.runtime.report_schema import Result


def render(runs: Sequence[Run]) -> bytes:
    """The runs as one HTML file that needs no network."""
    title = f"vit-export: {len(runs)} runs compared"
    body: list[list[Child]] = [[*cells[:-1], badge(cells[-1])] for cells in rows(runs)]
    drawn = [chart for chart in (_latency(runs), _drop(runs)) if chart] if available() else []
    return page(
        title,
        el("header", el("h1", title)),
        el(
            "main",
            section("Runs", el("div", *map(_card, runs), class_="cards")),
            section("Compare with care", items(doubts(runs))),
            section("Artifacts", table("Every artifact in every run", HEADERS, body)),
            section(
                "Charts",
                el("div", *drawn, class_="charts") if drawn else None,
                None if available() else el("p", WITHOUT),
            ),
        ),
    )


def _card(run: Run) -> Node:
    report = run.report
    env = report.environment
    versions = join(*(f"{name} {version}" for name, version in env.versions.items()))
    board = report.device.before.board if report.device else ""
    return el(
        "article",
        el("h3", run.name),
        el("p", join(report.model.spec, f"{report.created:%Y-%m-%d %H:%M %Z}")),
        el("p", summary(report)),
        el("p", join(board, env.cpu, env.machine, f"{env.threads} threads")),
        el("p", versions, class_="soft"),
        el("pre", report.command),
        class_="card",
    )


def _latency(runs: Sequence[Run]) -> Node | None:
    found = groups(runs)
    series = {run.name: [Bar(p50(g.entries[i].found)) for g in found] for i, run in enumerate(runs)}
    return _grouped("Latency", "Median milliseconds for one call; shorter is better.", found, series)


def _drop(runs: Sequence[Run]) -> Node | None:
    found = [g for g in groups(runs) if any(isinstance(entry.found, Result) for entry in g.entries)]
    series = {run.name: [_drop_bar(group, i) for group in found] for i, run in enumerate(runs)}
    caption = "Top-1 percentage points lost against that run's own FP32, with 95 % intervals."
    return _grouped("Accuracy lost", caption, found, series)


def _drop_bar(group: Group, index: int) -> Bar:
    found = group.entries[index].found
    if not isinstance(found, Result) or found.top1_drop is None:
        return Bar(None)
    return Bar(found.top1_drop, found.top1_drop_ci95)


def _grouped(title: str, caption: str, found: Sequence[Group], series: dict[str, list[Bar]]) -> Node | None:
    """Bars grouped by artifact, without the artifacts that no run measured."""
    kept = [i for i in range(len(found)) if any(values[i].value is not None for values in series.values())]
    if not kept:
        return None
    labels = [found[i].name for i in kept]
    shown = {name: [values[i] for i in kept] for name, values in series.items()}
    form = milliseconds if title == "Latency" else (lambda value: number(value, ".1f"))
    words = "; ".join(
        f"{label}: {', '.join(f'{name} {form(values[i].value)}' for name, values in shown.items())}"
        for i, label in enumerate(labels)
    )
    return figure(title, caption, words, bars(labels, shown))
