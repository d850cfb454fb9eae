"""From what tasks gave to reports: one a group, merged from its cells, and one table over all."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from vit_export.artifacts import Size
from vit_export.errors import RunnerError
from vit_export.runtime import report_files, report_schema
from vit_export.runtime.files import atomic_directory
from vit_export.runtime.latency import Timings
from vit_export.runtime.report_schema import Baseline, Ceilings, Report, Result
from vit_export.runtime.roofline import with_roofline
from vit_export.runtime.sweep_schema import Sweep, SweepCell, with_pareto
from vit_export.runtime.timed import timed, timed_baseline
from vit_export.runtime.verdict import judged
from vit_export.store import Store
from vit_export.sweep.flow import CellFlow, flat
from vit_export.sweep.tasks import Done, Prepared

Rows = Sequence[tuple[CellFlow, Done | None]]


@dataclass(frozen=True, slots=True)
class _Row:
    """A cell and what came of it. done: of its last task, None where no worker could do it.

    report: as a run with this artifact alone would give it, None if the cell did not get that far.
    """

    flow: CellFlow
    done: Done | None
    report: Report | None
    result: Result


@dataclass(frozen=True, slots=True)
class _Times:
    """What a latency task gave. failed: why it gave nothing."""

    timings: Timings
    ceilings: Ceilings | None = None
    failed: str = ""


def collect(
    rows: Rows,
    measured: Sequence[tuple[Done, Sequence[CellFlow]]],
    done: Mapping[str, Done],
    store: str,
    output: Path,
    sweep: Sweep,
) -> Sweep:
    """`sweep` with its groups and cells; each group's report and artifacts are written to output/GROUP.

    rows: each cell with its row, None where no worker could do it. measured: latencies and whose they are.
    """
    times = _times(measured)
    groups: dict[str, Report] = {}
    cells: list[SweepCell] = []
    for name in dict.fromkeys(flow.cell.group for flow, _ in rows):
        mine = [_row(flow, row, times.get(id(flow)), done) for flow, row in rows if flow.cell.group == name]
        results: Sequence[Result] = [row.result for row in mine]
        report = _merged(mine, sweep)
        if report is not None:
            folder = output / folder_of(name)
            _fetch(mine, done, Store(store), folder)
            report_files.write(report, folder)
            groups[name] = report
            results = report.results
        cells += [_cell(row, result, report, done) for row, result in zip(mine, results, strict=True)]
    return msgspec.structs.replace(sweep, groups=groups, cells=with_pareto(cells))


def folder_of(group: str) -> str:
    """A group's name as a folder's: letters, digits, dots, dashes."""
    return re.sub(r"[^\w.-]+", "-", group).strip("-.") or "group"


def _row(flow: CellFlow, row: Done | None, times: _Times | None, done: Mapping[str, Done]) -> _Row:
    """times: of this cell, None if it was not to be timed."""
    if row and row.value:
        report = report_schema.decode(row.value.encode())
        if times is not None:
            report = _with_times(report, times, flow.cell.job.batch_size or 1)
        return _Row(flow, row, report, report.results[0])
    failed = Result(
        target=flow.cell.job.targets[0],
        precision=flow.cell.job.precisions[0],
        image_size=_size(flow, done) or (1, 1),
        status="failed",
        reason=row.failed if row else f"no worker announces the resource {flow.missing}",
    )
    return _Row(flow, row, None, failed)


def _with_times(report: Report, times: _Times, batch: int) -> Report:
    """The report of one row with its latency and its share of the processor that took it."""
    if times.failed:
        return _untimed(report, f"latency was not measured: {times.failed}")
    report = msgspec.structs.replace(
        report,
        baseline=timed_baseline(report.baseline, times.timings),
        results=tuple(timed(result, times.timings) for result in report.results),
    )
    macs = {report.baseline.image_size: report.model.macs} if report.model.macs else {}
    return with_roofline(report, macs, batch, lambda _: times.ceilings)


def _untimed(report: Report, reason: str) -> Report:
    """The report when nobody could time its baseline or, if it ran, its artifact."""
    results = (
        msgspec.structs.replace(result, reason=reason) if result.status == "ok" else result
        for result in report.results
    )
    baseline = msgspec.structs.replace(report.baseline, reason=reason)
    return msgspec.structs.replace(report, baseline=baseline, results=tuple(results))


def _times(measured: Sequence[tuple[Done, Sequence[CellFlow]]]) -> dict[int, _Times]:
    """By the id of the cell's flow. Workers of one machine measure its ceilings each: the first are taken."""
    machines: dict[tuple[str, int], Ceilings] = {}
    found: dict[int, _Times] = {}
    for given, flows in measured:
        times = _Times(Timings({}), failed=given.failed) if given.failed else _times_of(given.value)
        if times.ceilings is not None:
            first = machines.setdefault((given.host, times.ceilings.threads), times.ceilings)
            times = replace(times, ceilings=first)
        found |= dict.fromkeys(map(id, flows), times)
    return found


def _times_of(value: Mapping[str, Any]) -> _Times:
    """What `tasks.measure` gives."""
    rounds = {
        name: tuple(np.asarray(turn, np.int64) for turn in turns) for name, turns in value["rounds"].items()
    }
    failed = {name: RunnerError(reason) for name, reason in value["failed"].items()}
    return _Times(Timings(rounds, failed), msgspec.convert(value["ceilings"], Ceilings | None))


def _merged(rows: Sequence[_Row], sweep: Sweep) -> Report | None:
    """One report of a group's rows, judged as a run of one process would; None if no cell got that far."""
    reports = [row.report for row in rows if row.report is not None]
    if not reports:
        return None
    first = reports[0]
    baselines = _baselines(reports)
    ceilings = {report.ceilings for report in reports if report.ceilings is not None}
    calib = next((report.data.calib for report in reports if report.data.calib), None)
    notes = tuple(dict.fromkeys(note for report in reports for note in report.model.notes))
    final = judged(
        [row.result for row in rows], family=first.model.family, spec=first.model.spec,
        limits=rows[0].flow.cell.job.limits, embeddings=first.model.num_classes == 0,
    )  # fmt: skip
    return msgspec.structs.replace(
        first,
        created=sweep.created,
        command=sweep.command,
        model=msgspec.structs.replace(first.model, notes=notes),
        data=msgspec.structs.replace(first.data, calib=calib),
        baseline=baselines[0],
        more_baselines=baselines[1:],
        results=tuple(_each_once(result) for result in final),
        ceilings=ceilings.pop() if len(ceilings) == 1 else None,
        reused=(),
    )


def _each_once(result: Result) -> Result:
    """A row was judged before it was timed: its notes, each once."""
    return msgspec.structs.replace(result, notes=tuple(dict.fromkeys(result.notes)))


def _baselines(reports: Sequence[Report]) -> tuple[Baseline, ...]:
    """Of each size the first that was timed, else one that says why not, else any."""
    sizes: dict[Size, list[Baseline]] = {}
    for report in reports:
        sizes.setdefault(report.baseline.image_size, []).append(report.baseline)
    return tuple(max(same, key=_known) for same in sizes.values())


def _known(baseline: Baseline) -> tuple[bool, bool]:
    return baseline.latency_ms is not None, baseline.reason != ""


def _size(flow: CellFlow, done: Mapping[str, Done]) -> Size | None:
    prepared = done.get(flow.prepare.key)
    if prepared and prepared.value:
        return msgspec.convert(prepared.value, Prepared).contract.size
    return next(iter(flow.cell.job.image_sizes), None)


def _fetch(rows: Sequence[_Row], done: Mapping[str, Done], store: Store, folder: Path) -> None:
    """Bring the artifacts of a group's cells from the store to where the report says they are."""
    for row in rows:
        result = row.result
        if row.report is None or result.artifact is None:
            continue
        keys = done[row.flow.build.key].keys
        height, width = result.image_size
        place = folder / result.target / result.precision / f"{height}x{width}"
        with atomic_directory(place) as part:
            if store.get(keys[f"build {result.target} {result.precision}"], part) is None:
                raise RunnerError(f"the store has lost {row.flow.cell.name}", "run the sweep again")
        if "calibrate" in keys:
            store.get(keys["calibrate"], folder / f"plans/{height}x{width}")


def _cell(row: _Row, result: Result, report: Report | None, done: Mapping[str, Done]) -> SweepCell:
    """result: the row's, as it was judged among its group's."""
    return SweepCell(
        group=row.flow.cell.group,
        target=result.target,
        precision=result.precision,
        options=dict(row.flow.cell.options),
        image_size=result.image_size if result.image_size != (1, 1) else None,
        status=result.status,
        reason=result.reason,
        verdict=result.verdict,
        device=report.environment.cpu if report and result.latency_ms else "",
        images=report.data.eval.sha256 if report and report.data.eval else "",
        accuracy=result.top1 if result.top1 is not None else result.agreement,
        p50_ms=result.latency_ms.p50 if result.latency_ms else None,
        bytes=result.bytes,
        made=tuple(dict.fromkeys(_made(row, done))),
    )


def _made(row: _Row, done: Mapping[str, Done]) -> Iterator[str]:
    """The stages that ran for a cell, those that it shares with others included."""
    for node in (*flat(row.flow.row.before), *flat(row.flow.build.before)):
        if node.key in done:
            yield from done[node.key].made
    if row.done:
        yield from row.done.made
