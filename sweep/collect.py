"""From what tasks gave to reports: one a group, merged from its cells, and one table over all."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from vit_export.artifacts import Size
from vit_export.errors import RunnerError
from vit_export.runtime import report_files, report_schema
from vit_export.runtime.files import atomic_directory
from vit_export.runtime.latency import Timings
from vit_export.runtime.report_schema import Baseline, Report, Result
from vit_export.runtime.sweep_schema import Sweep, SweepCell, with_pareto
from vit_export.runtime.timed import timed, timed_baseline
from vit_export.runtime.verdict import judged
from vit_export.store import Store
from vit_export.sweep.flow import CellFlow, flat
from vit_export.sweep.tasks import Done, Prepared

Rows = Sequence[tuple[CellFlow, Done | None]]


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
    groups: dict[str, Report] = {}
    cells: list[SweepCell] = []
    for name in dict.fromkeys(flow.cell.group for flow, _ in rows):
        mine = [(flow, row) for flow, row in rows if flow.cell.group == name]
        times = [_timings(given) for given, flows in measured if flows[0].cell.group == name]
        results = [_result(flow, row, done, times) for flow, row in mine]
        report = _merged(mine, results, times, sweep)
        if report is not None:
            folder = output / folder_of(name)
            _fetch(mine, done, Store(store), folder)
            report_files.write(report, folder)
            groups[name] = report
            results = list(report.results)
        cells += [
            _cell(flow, result, report, row, done) for (flow, row), result in zip(mine, results, strict=True)
        ]
    return msgspec.structs.replace(sweep, groups=groups, cells=with_pareto(cells))


def folder_of(group: str) -> str:
    """A group's name as a folder's: letters, digits, dots, dashes."""
    return re.sub(r"[^\w.-]+", "-", group).strip("-.") or "group"


def _result(flow: CellFlow, row: Done | None, done: Mapping[str, Done], times: Sequence[Timings]) -> Result:
    """The one result of a row, with its latency; a failed one without a row."""
    report = _report(row)
    if report is not None:
        result = report.results[0]
        for timings in times:
            result = timed(result, timings)
        return result
    reason = row.failed if row else f"no worker announces the resource {flow.missing}"
    return Result(
        target=flow.cell.job.targets[0],
        precision=flow.cell.job.precisions[0],
        image_size=_size(flow, done) or (1, 1),
        status="failed",
        reason=reason,
    )


def _merged(rows: Rows, results: Sequence[Result], times: Sequence[Timings], sweep: Sweep) -> Report | None:
    """One report of a group's rows, judged as a run of one process would; None if no cell got that far."""
    reports = [report for report in (_report(row) for _, row in rows) if report is not None]
    if not reports:
        return None
    first = reports[0]
    baselines = {report.baseline.image_size: report.baseline for report in reports}
    merged = [_timed_baseline(baseline, times) for baseline in baselines.values()]
    limits = rows[0][0].cell.job.limits
    calib = next((report.data.calib for report in reports if report.data.calib), None)
    notes = tuple(dict.fromkeys(note for report in reports for note in report.model.notes))
    final = judged(
        results, family=first.model.family, spec=first.model.spec, limits=limits,
        embeddings=first.model.num_classes == 0,
    )  # fmt: skip
    return msgspec.structs.replace(
        first,
        created=sweep.created,
        command=sweep.command,
        model=msgspec.structs.replace(first.model, notes=notes),
        data=msgspec.structs.replace(first.data, calib=calib),
        baseline=merged[0],
        more_baselines=tuple(merged[1:]),
        results=tuple(_each_once(result) for result in final),
        reused=(),
    )


def _each_once(result: Result) -> Result:
    """A row was judged before it was timed: its notes, each once."""
    return msgspec.structs.replace(result, notes=tuple(dict.fromkeys(result.notes)))


def _timed_baseline(baseline: Baseline, times: Sequence[Timings]) -> Baseline:
    """The baseline with the latency of the first task that timed its size."""
    height, width = baseline.image_size
    for timings in times:
        if any(name.endswith(f" {height}x{width}") for name in (*timings.rounds, *timings.failed)):
            return timed_baseline(baseline, timings)
    return baseline


def _timings(measured: Done) -> Timings:
    value = measured.value or {"rounds": {}, "failed": {}}
    rounds = {
        name: tuple(np.asarray(turn, np.int64) for turn in turns) for name, turns in value["rounds"].items()
    }
    return Timings(rounds, {name: RunnerError(reason) for name, reason in value["failed"].items()})


def _report(row: Done | None) -> Report | None:
    return report_schema.decode(row.value.encode()) if row and row.value else None


def _size(flow: CellFlow, done: Mapping[str, Done]) -> Size | None:
    prepared = done.get(flow.prepare.key)
    if prepared and prepared.value:
        return msgspec.convert(prepared.value, Prepared).contract.size
    return next(iter(flow.cell.job.image_sizes), None)


def _fetch(rows: Rows, done: Mapping[str, Done], store: Store, folder: Path) -> None:
    """Bring the artifacts of a group's cells from the store to where the report says they are."""
    for flow, row in rows:
        report = _report(row)
        if report is None or report.results[0].artifact is None:
            continue
        result = report.results[0]
        keys = done[flow.build.key].keys
        height, width = result.image_size
        place = folder / result.target / result.precision / f"{height}x{width}"
        with atomic_directory(place) as part:
            if store.get(keys[f"build {result.target} {result.precision}"], part) is None:
                raise RunnerError(f"the store has lost {flow.cell.name}", "run the sweep again")
        if "calibrate" in keys:
            store.get(keys["calibrate"], folder / f"plans/{height}x{width}")


def _cell(
    flow: CellFlow, result: Result, report: Report | None, row: Done | None, done: Mapping[str, Done]
) -> SweepCell:
    return SweepCell(
        group=flow.cell.group,
        target=result.target,
        precision=result.precision,
        options=dict(flow.cell.options),
        image_size=result.image_size if result.image_size != (1, 1) else None,
        status=result.status,
        reason=result.reason,
        verdict=result.verdict,
        device=report.environment.cpu if report and result.latency_ms else "",
        images=report.data.eval.sha256 if report and report.data.eval else "",
        accuracy=result.top1 if result.top1 is not None else result.agreement,
        p50_ms=result.latency_ms.p50 if result.latency_ms else None,
        bytes=result.bytes,
        made=tuple(dict.fromkeys(_made(flow, row, done))),
    )


def _made(flow: CellFlow, row: Done | None, done: Mapping[str, Done]) -> Iterator[str]:
    """The stages that ran for a cell, those that it shares with others included."""
    for node in (*flat(flow.row.before), *flat(flow.build.before)):
        if node.key in done:
            yield from done[node.key].made
    if row:
        yield from row.made
