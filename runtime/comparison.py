"""Several reports side by side: the same artifact on several devices, commits or options.

Nothing is judged here, that is the gate's work; what makes numbers incomparable is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from vit_export.runtime import report_files
from vit_export.runtime.console import plain_table
from vit_export.runtime.files import write_atomic
from vit_export.runtime.report_cells import NONE, milliseconds, number, printable, status
from vit_export.runtime.report_schema import Baseline, Report, Result

HEADERS = ("artifact", "run", "p50 ms", "p99 ms", "vs run 1", "top-1", "drop", "verdict")


@dataclass(frozen=True, slots=True)
class Run:
    """One report and what to call it: `1: jetson/report.json`."""

    name: str
    report: Report


@dataclass(frozen=True, slots=True)
class Entry:
    """One artifact or baseline in one run; None where the run does not have it."""

    run: Run
    found: Baseline | Result | None


@dataclass(frozen=True, slots=True)
class Group:
    """The same artifact, one entry a run, in the runs' order."""

    name: str
    entries: tuple[Entry, ...]


def read_runs(paths: Sequence[Path]) -> tuple[Run, ...]:
    """Reports by path, numbered from 1 so that equal names stay apart. Raises InputError as `read` does."""
    return tuple(Run(f"{i}: {path}", report_files.read(path)) for i, path in enumerate(paths, 1))


def write(runs: Sequence[Run], path: Path) -> None:
    """Write the page that compares them. Raises UsageError for a place that cannot be written."""
    from vit_export.runtime.comparison_html import render

    write_atomic(path, render(runs))


def print_runs(runs: Sequence[Run], console: Console) -> None:
    """The runs, what to mind, and a table that calls them by number."""
    for line in (*(run.name for run in runs), *doubts(runs)):
        console.print(printable(line), soft_wrap=True)
    body = ((name, run.partition(":")[0], *cells) for name, run, *cells in rows(runs))
    console.print(plain_table(HEADERS, body))


def groups(runs: Sequence[Run]) -> tuple[Group, ...]:
    """Baselines and artifacts of all runs in the order they first appear."""
    tables = [dict(_named(run.report)) for run in runs]
    names = dict.fromkeys(name for table in tables for name in table)
    return tuple(
        Group(name, tuple(Entry(run, table.get(name)) for run, table in zip(runs, tables, strict=True)))
        for name in names
    )


def rows(runs: Sequence[Run]) -> Iterator[tuple[str, ...]]:
    """One line an artifact and run, as HEADERS. `vs run 1` is how many times faster than run 1."""
    for group in groups(runs):
        first = p50(group.entries[0].found)
        for entry in group.entries:
            yield group.name, entry.run.name, *_cells(entry.found, first)


def p50(found: Baseline | Result | None) -> float | None:
    """The median in milliseconds, None where it was not measured."""
    return found.latency_ms.p50 if found and found.latency_ms else None


def doubts(runs: Sequence[Run]) -> Iterator[str]:
    """What keeps the runs from being compared like with like."""
    first, *others = runs
    for run in others:
        for words, differs in (
            ("another model", _model(first.report) != _model(run.report)),
            ("another processor: latencies compare the machines", _cpu(first.report) != _cpu(run.report)),
            ("another number of threads", _threads(first.report) != _threads(run.report)),
            (
                "other evaluation images: accuracies are not comparable",
                _eval(first.report) != _eval(run.report),
            ),
            ("another preprocessing", _contract(first.report) != _contract(run.report)),
        ):
            if differs:
                yield f"{run.name} against {first.name}: {words}"


def _named(report: Report) -> Iterator[tuple[str, Baseline | Result]]:
    for base in (report.baseline, *report.more_baselines):
        yield base.name, base
    for result in report.results:
        yield result.name, result


def _cells(found: Baseline | Result | None, first: float | None) -> tuple[str, ...]:
    if found is None:
        return (*[NONE] * 5, "not in this run")
    median = p50(found)
    drop = found.top1_drop if isinstance(found, Result) else None
    return (
        milliseconds(median),
        milliseconds(found.latency_ms.p99 if found.latency_ms else None),
        NONE if median is None or first is None else f"{first / median:.2f}x",
        number(found.top1, ".3f"),
        number(drop, ".1f"),
        status(found) if isinstance(found, Result) else "baseline",
    )


def _model(report: Report) -> tuple[str, int]:
    return report.model.spec, report.model.parameters


def _cpu(report: Report) -> tuple[str, str, str]:
    board = report.device.before.board if report.device else ""
    return report.environment.cpu, report.environment.machine, board


def _threads(report: Report) -> int:
    return report.environment.threads


def _eval(report: Report) -> str | None:
    return report.data.eval.sha256 if report.data.eval else None


def _contract(report: Report) -> str:
    return report.model.preprocessing_sha256
