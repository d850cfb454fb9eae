"""Tables for the terminal. They fit 80 columns; colour follows rich, so NO_COLOR and pipes turn it off."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TextIO

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from vit_export.runtime.gate import Check, GateOutcome
from vit_export.runtime.report_cells import (
    HEADERS,
    device_facts,
    number,
    printable,
    rows,
    status,
    untimed,
    why,
)
from vit_export.runtime.report_schema import Report
from vit_export.runtime.report_sections import sections
from vit_export.runtime.sweep import CAPTION, TITLE, sweep
from vit_export.runtime.sweep import HEADERS as SWEEP_HEADERS

STYLES = {
    "ship": "green", "hold": "red", "not run": "yellow", "baseline": "dim",
    "passed": "green", "failed": "red", "inconclusive": "yellow", "not_run": "yellow",
}  # fmt: skip


_OUTCOMES = {
    "passed": "",
    "failed": ": a limit is broken, or an artifact failed",
    "inconclusive": ": nothing broken, but not all could be decided (exit code {code}, by inconclusive_exit)",
}


def make_console(file: TextIO | None = None, *, stderr: bool = False) -> Console:
    """A console that prints what it is given: no markup, no emoji, no guessed highlighting."""
    return Console(file=file, stderr=stderr, markup=False, emoji=False, highlight=False)


def print_report(report: Report, console: Console) -> None:
    """The table of results, accuracy against resolution, each verdict with its reason and notes.

    Notes of several results come last, once.
    """
    shared = {note: n for note, n in Counter(n for r in report.results for n in r.notes).items() if n > 1}
    console.print(result_table(report))
    console.print()
    if lines := sweep(report):
        console.print(plain_table(SWEEP_HEADERS, lines, TITLE))
        console.print(CAPTION, style="dim")
        console.print()
    for section in sections(report):
        if section.brief:
            console.print(plain_table(section.headers, section.rows, section.title))
        console.print(section.caption, style="dim", soft_wrap=True)
        console.print()
    for name, reason in untimed(report):
        console.print(Text.assemble(printable(name), " ", ("not timed", STYLES["not_run"])))
        console.print(Padding(Text(reason), (0, 0, 0, 2)))
    for result in report.results:
        verdict = status(result)
        console.print(Text.assemble(printable(result.name), " ", (verdict, STYLES.get(verdict, ""))))
        console.print(Padding(Text(why(result)), (0, 0, 0, 2)))
        _print_notes((note for note in result.notes if note not in shared), console)
    if shared:
        console.print("several artifacts")
        _print_notes(shared, console)


def _print_notes(notes: Iterable[str], console: Console) -> None:
    """Lines to copy from, so they are not broken."""
    for note in notes:
        console.print(f"  {printable(note)}", style="dim", soft_wrap=True)


def print_device(report: Report, console: Console) -> None:
    """What a device told of itself while it was measured; nothing for another report."""
    for fact in device_facts(report.device) if report.device else ():
        console.print(printable(fact), style="dim", soft_wrap=True)


def result_table(report: Report) -> Table:
    """Baseline first, then artifacts; see report_cells.HEADERS. ~ marks an unstable latency.

    Names leave out the image size where all have the same, so that four targets fit 80 columns.
    """
    sizes = {baseline.image_size for baseline in (report.baseline, *report.more_baselines)}
    sizes |= {result.image_size for result in report.results}
    size = "x".join(map(str, sizes.pop())) if len(sizes) == 1 else "-"
    table = _table(HEADERS)
    for column in table.columns[1:-1]:
        column.justify = "right"
    for row in rows(report):
        name, *cells, verdict = (printable(cell) for cell in row.cells)
        cells.insert(0, name.removesuffix(f" {size}"))
        stacked = (Text(cell.replace(" [", "\n[")) for cell in cells)  # the interval under the drop
        table.add_row(*stacked, Text(verdict, STYLES.get(row.status, "")))
    return table


def print_gate(outcome: GateOutcome, console: Console) -> None:
    """The checks, then the outcome in words with the exit code it gives."""
    console.print(gate_table(outcome.checks))
    words = _OUTCOMES[outcome.outcome].format(code=outcome.exit_code)
    told = Text.assemble("gate: ", (outcome.outcome, STYLES[outcome.outcome]), words)
    console.print(told, soft_wrap=True)


def gate_table(checks: Iterable[Check]) -> Table:
    """One line a check of the gate: artifact, rule, value, outcome and why."""
    table = _table(("artifact", "rule", "value", "outcome", "why"))
    for check in checks:
        name, rule, value = printable(check.result.name), check.rule.name, number(check.value, ".4g")
        outcome = Text(check.outcome.replace("_", " "), STYLES[check.outcome])
        table.add_row(Text(name), Text(rule), Text(value), outcome, Text(printable(check.reason)))
    return table


def plain_table(headers: Sequence[str], body: Iterable[Sequence[str]], title: str = "") -> Table:
    """A left-aligned table of text, for lists such as `models` and `doctor`."""
    table = _table(headers)
    table.title, table.title_justify = title or None, "left"
    for cells in body:
        table.add_row(*(Text(printable(cell)) for cell in cells))
    return table


def _table(headers: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
    for header in headers:
        table.add_column(header, overflow="fold")
    return table
