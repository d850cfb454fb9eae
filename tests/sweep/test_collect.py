"""A sweep's rows with their times: the fields of a run of one process, whatever machine took them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from contracts import sample_report
from contracts.sample_report import SIZE, result
from vit_export.artifacts import Precision
from vit_export.job import ExportJob
from vit_export.runtime.report_schema import Ceilings, Report, Roofline, encode
from vit_export.runtime.report_sections import roofline
from vit_export.runtime.sweep_schema import Sweep
from vit_export.sweep.collect import collect
from vit_export.sweep.flow import CellFlow, Flow
from vit_export.sweep.matrix import Cell
from vit_export.sweep.tasks import Done

TOPS = Ceilings(runtime="openvino 2026.4.1", threads=2, fp32=100.0, bf16=200.0, int8=400.0)
FIELDS = {"artifact": None, "latency_ms": None, "speedup": None}


def flow_of(target: str, group: str = "digits-vit") -> CellFlow:
    """An int8 cell of the embedded model."""
    job = ExportJob(targets=(target,), precisions=(Precision.INT8,), image_sizes=(SIZE,), eval_size=4)
    return Flow("unused", threads=2).cell(Cell(group, {}, job))


def row_of(target: str) -> Done:
    """An untimed row: 6.1 GMAC an image."""
    bare = sample_report.report(result(target=target, **FIELDS))
    baseline = msgspec.structs.replace(bare.baseline, latency_ms=None)
    return Done("row", encode(msgspec.structs.replace(bare, baseline=baseline)).decode())


def measured(
    host: str, tops: Ceilings | None = TOPS, failed: dict[str, str] | None = None, **ms: int
) -> Done:
    """A latency task's end. ms: of each call, by target or `pytorch`."""
    names = {name: name if name == "pytorch" else f"{name} int8 224x224" for name in ms}
    rounds = {names[name]: [[value * 1_000_000] * 60] for name, value in ms.items()}
    value = {"rounds": rounds, "failed": failed or {}, "ceilings": msgspec.to_builtins(tops)}
    return Done("latency", value, host=host)


def collected(folder: Path, *given: tuple[str, Done]) -> Report:
    """The report of one group: (target, its latency task) for each row."""
    flows = [flow_of(target) for target, _ in given]
    empty = Sweep(created=sample_report.report().created, command="vit-export sweep", groups={}, cells=())
    rows = [(flow, row_of(target)) for flow, (target, _) in zip(flows, given, strict=True)]
    times = [(done, [flow]) for flow, (_, done) in zip(flows, given, strict=True)]
    sweep = collect(rows, times, {}, str(folder / "store"), folder / "out", empty)
    assert [cell.p50_ms is not None for cell in sweep.cells] == [
        one.latency_ms is not None for one in sweep.groups["digits-vit"].results
    ]
    return sweep.groups["digits-vit"]


def shares(report: Report) -> list[Any]:
    """(GMAC/s, share) of the baseline and of each row."""
    found: list[Roofline | None] = [report.baseline.roofline, *(one.roofline for one in report.results)]
    return [one and (one.gmac_per_s, one.share) for one in found]


def test_rows_have_their_share_of_the_processor(tmp_path: Path):
    """6.1 GMAC in 20 ms are 305 GMAC/s of int8's 400; the baseline's 61 ms are 100 GMAC/s of fp32's 100."""
    found = collected(tmp_path, ("onnx", measured("one", pytorch=61, onnx=20)))
    assert shares(found) == [(pytest.approx(100), pytest.approx(1)), (305, 0.7625)]
    assert found.ceilings == TOPS and found.results[0].speedup == pytest.approx(3.05)


def test_a_machine_has_one_set_of_ceilings(tmp_path: Path):
    """Two workers of one machine measured it each: all shares are of what the first found, which is shown."""
    again = replace_tops(int8=500.0)
    both = (("onnx", measured("one", pytorch=61, onnx=20)), ("openvino", measured("one", again, openvino=20)))
    found = collected(tmp_path, *both)
    assert found.ceilings == TOPS
    assert [share for _, share in shares(found)[1:]] == [0.7625, 0.7625]


def test_rows_of_two_machines_keep_their_own(tmp_path: Path):
    """Each share is of the ceiling of the machine that took the time, and the report says so."""
    other = replace_tops(int8=610.0)
    both = (("onnx", measured("one", pytorch=61, onnx=20)), ("openvino", measured("two", other, openvino=20)))
    found = collected(tmp_path, *both)
    assert [share for _, share in shares(found)[1:]] == [0.7625, 0.5]
    assert found.ceilings is None and "several machines" in roofline(found).caption


def test_a_time_that_was_not_taken_says_why(tmp_path: Path):
    """A baseline that died costs the ratio; a latency task that failed leaves rows with its reason."""
    died = measured("one", failed={"pytorch": "the pytorch worker died with SIGSEGV"}, onnx=20)
    found = collected(tmp_path / "a", ("onnx", died))
    assert found.baseline.reason == "the pytorch worker died with SIGSEGV"
    assert (found.results[0].status, found.results[0].speedup) == ("ok", None)
    assert shares(found) == [None, (305, 0.7625)]

    lost = replace(measured("one"), value=None, failed="KilledWorker: latency-1")
    found = collected(tmp_path / "b", ("onnx", lost))
    reason = "latency was not measured: KilledWorker: latency-1"
    assert found.baseline.reason == found.results[0].reason == reason
    assert found.results[0].status == "ok" and reason in found.results[0].verdict_reason


def replace_tops(**changes: float) -> Ceilings:
    """TOPS as another measurement found them."""
    return msgspec.structs.replace(TOPS, **changes)
