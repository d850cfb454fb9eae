"""sweep.md and sweep.html: every cell in one table, the Pareto front of each device first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vit_export.runtime.html_tree import Child, badge, el, items, page, section, table
from vit_export.runtime.report_cells import NONE, megabytes, milliseconds, number
from vit_export.runtime.report_markdown import escape
from vit_export.runtime.report_markdown import table as markdown_table
from vit_export.runtime.sweep_schema import Sweep, SweepCell

HEADERS = ("cell", "MB", "p50 ms", "accuracy", "front", "verdict")
_WORK = ("stage", "ran", "in the store", "failed", "seconds")


def markdown(sweep: Sweep) -> bytes:
    """The sweep as GitHub-flavoured Markdown, UTF-8."""
    lines = ["# vit-export sweep", "", summary(sweep), ""]
    for device, cells in by_device(sweep.cells).items():
        lines += [f"## {escape(device or 'not measured')}", "", *markdown_table(HEADERS, map(row, cells)), ""]
    lines += [f"- **{escape(cell.name)}**: {escape(cell.reason)}" for cell in sweep.cells if cell.reason]
    lines += ["", "## Work", "", *markdown_table(_WORK, _work(sweep)), "", f"`{escape(sweep.command)}`"]
    return ("\n".join(lines).rstrip() + "\n").encode()


def html(sweep: Sweep) -> bytes:
    """The sweep as one HTML file that needs no network; each group links to its own report."""
    sections = []
    for device, cells in by_device(sweep.cells).items():
        body: list[list[Child]] = [[*row(cell)[:-1], badge(_state(cell))] for cell in cells]
        caption = f"Cells on {device}" if device else "Cells without a measurement"
        sections.append(section(device or "Not measured", table(caption, HEADERS, body)))
    reasons = items(f"{cell.name}: {cell.reason}" for cell in sweep.cells if cell.reason)
    return page(
        "vit-export sweep",
        el("header", el("h1", "vit-export sweep"), el("p", summary(sweep), class_="soft")),
        el(
            "main",
            *sections,
            section("Not run or failed", reasons),
            section("Work", table("Stages", _WORK, [list(line) for line in _work(sweep)])),
            section("The command", el("pre", sweep.command)),
        ),
    )


def summary(sweep: Sweep) -> str:
    """`24 cells in 3 groups: 20 ok, 3 not run, 1 failed; 5 on a Pareto front. 61.0 s on 2 workers.`"""
    states = [cell.status for cell in sweep.cells]
    counts = ", ".join(
        f"{states.count(state)} {state.replace('_', ' ')}" for state in ("ok", "not_run", "failed")
    )
    front = sum(cell.pareto for cell in sweep.cells)
    return (
        f"{len(states)} cells in {len(sweep.groups)} reports: {counts}; {front} on a Pareto front of "
        f"accuracy, latency and size. {sweep.seconds:.1f} s on {sweep.workers} workers."
    )


def by_device(cells: Sequence[SweepCell]) -> dict[str, list[SweepCell]]:
    """Cells by device; on the front first, then from the fastest."""
    devices = dict.fromkeys(cell.device for cell in cells)
    order = sorted(cells, key=lambda cell: (not cell.pareto, cell.p50_ms is None, cell.p50_ms or 0.0))
    return {device: [cell for cell in order if cell.device == device] for device in devices}


def row(cell: SweepCell) -> tuple[str, ...]:
    """One line of HEADERS."""
    return (
        cell.name,
        megabytes(cell.bytes),
        milliseconds(cell.p50_ms),
        number(cell.accuracy, ".3f"),
        "front" if cell.pareto else NONE,
        _state(cell),
    )


def _state(cell: SweepCell) -> str:
    return cell.verdict or cell.status.replace("_", " ")


def _work(sweep: Sweep) -> Iterator[tuple[str, ...]]:
    for work in sweep.work:
        yield work.stage, str(work.made), str(work.reused), str(work.failed), f"{work.seconds:.1f}"
