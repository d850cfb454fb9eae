"""A sweep on a real Dask scheduler and real workers: the rows of one process, never the same work twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from distributed import Client

from vit_export import one_size, pipeline
from vit_export.artifacts import Precision
from vit_export.calibration.percentile import PercentileConfig
from vit_export.errors import RunnerError
from vit_export.job import ExportJob
from vit_export.runtime import gate, sweep_schema
from vit_export.runtime.latency import Timings
from vit_export.runtime.report_schema import Report
from vit_export.runtime.sweep_schema import Sweep
from vit_export.search.choices import Choices
from vit_export.sweep import matrix, run
from vit_export.sweep.matrix import Cell

TIMES = (
    "latency_ms", "speedup", "speedup_vs_fp16", "roofline", "peak_rss_bytes", "verdict", "verdict_reason",
    "gates",
)  # fmt: skip
BASE = ExportJob(
    eval_size=40, calib_size=16, threads=1, bundle_images=None, timeout=3000.0, part=32, choices=Choices()
)


class Cluster:
    """A scheduler and two workers on 127.0.0.1, each a process group of its own."""

    def __init__(self, folder: Path) -> None:
        self.address = ""
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1", "DASK_DISTRIBUTED__DASHBOARD__LINK": ""}

    def __enter__(self) -> Cluster:
        file = self._folder / "scheduler.json"
        arguments = ("--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file))
        self._start("distributed.cli.dask_scheduler", *arguments)
        deadline = time.monotonic() + 60
        while not file.exists() or not file.read_text().endswith("}"):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        self.address = json.loads(file.read_text())["address"]
        for name in ("one", "two"):
            self._start("vit_export", "worker", "--scheduler", self.address, "--name", name, "--no-probe")
        with Client(self.address) as client:
            client.wait_for_workers(2, timeout=120)
        return self

    def __exit__(self, *error: object) -> None:
        for process in reversed(self._processes):
            self._kill(process)

    def kill_a_worker(self) -> None:
        """SIGKILL to the first worker, its nanny and what they had started."""
        self._kill(self._processes.pop(1))

    def kill_the_scheduler(self) -> None:
        """SIGKILL to the scheduler."""
        self._kill(self._processes.pop(0))

    def _start(self, module: str, *arguments: str) -> None:
        command = [sys.executable, "-m", module, *arguments]
        log = (self._folder / f"{len(self._processes)}.log").open("wb")
        self._processes.append(
            subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, env=self._environment,
                cwd=self._folder,
            )
        )  # fmt: skip

    @staticmethod
    def _kill(process: subprocess.Popen[bytes]) -> None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster")) as started:
        yield started


def cells(
    models: dict[str, dict[str, Any]], sizes: Any, targets: Any, precisions: Any, **changes: Any
) -> list[Cell]:
    """The product, as sweep.toml would give it."""
    return [
        Cell(name, {}, matrix.only_what_matters(replace(
            BASE, **{**model, **changes}, image_sizes=(size,), targets=(target,), precisions=(precision,)
        )))
        for name, model in models.items() for size in sizes for target in targets for precision in precisions
    ]  # fmt: skip


def swept(
    wanted: list[Cell],
    folder: Path,
    address: str,
    notify: Callable[..., None] = lambda *_: None,
    *,
    timed: bool = False,
) -> Sweep:
    job = run.SweepJob(wanted, folder / "out", str(folder / "store"), address, timed=timed)
    return run.run(job, "vit-export sweep", notify)


def rows(report: Report) -> dict[str, dict[str, Any]]:
    """A report's results by name, without what was timed or judged by time."""
    made = [msgspec.to_builtins(result, enc_hook=str) for result in report.results]
    names = [result.name for result in report.results]
    return {
        name: {key: value for key, value in row.items() if key not in TIMES}
        for name, row in zip(names, made, strict=True)
    }


def single(group: dict[str, Any], sizes: Any, targets: Any, precisions: Any, folder: Path) -> Report:
    """The same cells in one process, without any store, unsharded and not timed."""

    def instead(runnables: Any, **settings: Any) -> Timings:
        import numpy as np

        return Timings({name: (np.full(50, 1_000_000),) for name in runnables})

    asked = {"image_sizes": sizes, "targets": targets, "precisions": precisions, "output": folder}
    job = replace(BASE, **group, **asked, part=None, resume=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_size, "alternate", instead)
        return pipeline.run(job)


def made(sweep: Sweep) -> set[str]:
    return {work.stage for work in sweep.work if work.made}


def test_a_killed_worker_a_rerun_and_a_change(cluster: Cluster, tmp_path: Path) -> None:
    """Two workers, one killed in the middle: the rows of one process. Again: nothing runs.

    With one calibration option changed the int8 cells run again, the float cell does not. Timed, both have
    their share of the processor.
    """
    group, sizes, precisions = {"digits-vit": {}}, ((48, 48),), (Precision.FP32, Precision.INT8)
    killed = []

    def kill(stage: str, done: int, total: int) -> None:
        if done >= 2 and not killed:
            killed.append(cluster.kill_a_worker())

    first = swept(cells(group, sizes, ("onnx",), precisions), tmp_path, cluster.address, kill)
    assert killed and [cell.status for cell in first.cells] == ["ok", "ok"], [c.reason for c in first.cells]
    one = single({}, sizes, ("onnx",), precisions, tmp_path / "single")
    assert rows(first.groups["digits-vit"]) == rows(one)
    assert first.groups["digits-vit"].data == one.data

    again = swept(cells(group, sizes, ("onnx",), precisions), tmp_path, cluster.address)
    assert made(again) == set() and all(cell.made == () for cell in again.cells)
    assert rows(again.groups["digits-vit"]) == rows(one)

    changed = cells(group, sizes, ("onnx",), precisions, choices=Choices(PercentileConfig()))
    third = swept(changed, tmp_path, cluster.address, timed=True)
    assert {cell.precision: bool(cell.made) for cell in third.cells} == {"fp32": False, "int8": True}
    assert {work.stage: work.made for work in third.work} == {
        "prepare": 0, "evaluate": 2, "calibrate": 1, "build": 1, "row": 1, "latency": 1,
    }  # fmt: skip
    timed = third.groups["digits-vit"]
    for row in (timed.baseline, *timed.results):
        assert row.latency_ms is not None and row.roofline is not None and row.roofline.share

    saved = sweep_schema.read(tmp_path / "out")
    assert saved == third and (tmp_path / "out/sweep.html").exists()
    assert (tmp_path / "out/digits-vit" / str(third.groups["digits-vit"].results[1].artifact)).is_file()
    outcome = gate.gate_sweep(saved, saved)
    assert outcome.outcome in ("passed", "inconclusive")
    assert {check.result.target for check in outcome.checks} == {"digits-vit: onnx"}


def test_a_bad_cell_is_a_failed_row(cluster: Cluster, tmp_path: Path) -> None:
    """A size the model cannot take fails its own row, with the reason, and the gate turns red."""
    wanted = cells({"digits-vit": {}}, ((50, 50),), ("onnx",), (Precision.FP32,))
    sweep = swept(wanted, tmp_path, cluster.address)
    (cell,) = sweep.cells
    assert cell.status == "failed" and "50x50 does not fit" in cell.reason
    assert run.exit_code(sweep) == 3 and sweep.groups == {}


def test_a_lost_scheduler_is_said(tmp_path: Path) -> None:
    """A scheduler that dies in the middle ends the sweep with one error that says what to do."""
    wanted = cells({"digits-vit": {}}, ((48, 48),), ("onnx",), (Precision.FP32,))
    with Cluster(tmp_path) as cluster:
        gone = []

        def kill(stage: str, done: int, total: int) -> None:
            if not gone:
                gone.append(cluster.kill_the_scheduler())

        with pytest.raises(RunnerError, match="Dask scheduler was lost\n  run the same command again"):
            swept(wanted, tmp_path, cluster.address, kill)


@pytest.mark.slow
@pytest.mark.timeout(14_400)
def test_the_whole_matrix(tmp_path: Path) -> None:
    """3 models x 2 sizes x 2 targets x 2 precisions on the embedded data: the issue's own sweep."""
    from vit_export.data import DIGITS_VIT_WEIGHTS

    checkpoints = {name: {"load": _changed(DIGITS_VIT_WEIGHTS, tmp_path / f"{name}.safetensors", seed)}
                   for seed, name in enumerate(("first", "second"), 1)}  # fmt: skip
    models = {"digits-vit": {}, **checkpoints}
    sizes, targets = ((48, 48), (96, 96)), ("onnx", "openvino")
    precisions = (Precision.FP32, Precision.INT8)
    killed = []
    with Cluster(tmp_path) as cluster:

        def kill(stage: str, done: int, total: int) -> None:
            if done >= total // 3 and not killed:
                killed.append(cluster.kill_a_worker())

        wanted = cells(models, sizes, targets, precisions)
        first = swept(wanted, tmp_path, cluster.address, kill)
        assert len(first.cells) == 24 and all(cell.status == "ok" for cell in first.cells), first.cells
        for name, model in models.items():
            one = single(model, sizes, targets, precisions, tmp_path / f"single-{name}")
            assert rows(first.groups[name]) == rows(one)
        again = swept(wanted, tmp_path, cluster.address)
        assert made(again) == set()
        third = swept(cells(models, sizes, targets, precisions, calib_size=17), tmp_path, cluster.address)
        assert {cell.precision for cell in third.cells if cell.made} == {"int8"}
        assert all(cell.made for cell in third.cells if cell.precision == "int8")


def _changed(weights: Path, path: Path, seed: int) -> Any:
    """The embedded weights with a little noise: another model of the same shape."""
    import torch
    from safetensors.torch import load_file, save_file

    from vit_export.models.config import LoadOptions

    torch.manual_seed(seed)
    save_file({k: v + 1e-3 * torch.randn_like(v) for k, v in load_file(weights).items()}, path)
    return LoadOptions(checkpoint=path)
