"""Verifying a bundle here, with the fake runner in the artifact's place: rows, reasons and exit codes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from contracts.bundles import IMAGES, fake_bundle
from contracts.sample_report import result
from vit_export.artifacts import Precision, Runnable
from vit_export.errors import InputError, UsageError, WorkerCrash
from vit_export.runtime import build_here, report_files, verify_size
from vit_export.runtime.bundle_manifest import StoredArtifact
from vit_export.runtime.bundle_open import open_bundle
from vit_export.runtime.report_schema import Report
from vit_export.runtime.verify import VerifyJob, exit_code, verify, workspace


@pytest.fixture(autouse=True)
def brief_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few calls are enough where no time is looked at."""
    real = verify_size.alternate

    def brief(runnables: Any, **settings: Any) -> Any:
        return real(runnables, **settings, rounds=1, warmup=1, runs=3, min_seconds=0.0)

    monkeypatch.setattr(verify_size, "alternate", brief)


def run(path: Path, output: Path, **job: Any) -> Report:
    """Open and verify."""
    with workspace(output) as work:
        return verify(open_bundle(path, work), VerifyJob(**job), output, work, "vit-export verify")


def test_the_report_is_that_of_the_device(tmp_path: Path) -> None:
    """An artifact equal to the baseline: all images, latency, memory, the device; no baseline speed."""
    report = run(fake_bundle(tmp_path / "out"), tmp_path / "here")
    assert report == report_files.read(tmp_path / "here")
    (result,) = report.results
    assert (result.status, result.images, result.agreement, result.top1) == ("ok", IMAGES, 1.0, 1.0)
    assert result.latency_ms is not None and result.latency_ms.p50 > 0
    assert result.peak_rss_bytes is not None and result.peak_rss_bytes > 1 << 20
    assert result.details["golden_sqnr_db"] is None  # no error at all
    assert result.verdict == "ship"
    assert "ms" in result.verdict_reason
    assert report.baseline.latency_ms is None
    assert (report.baseline.top1, report.baseline.runtime_version) == (1.0, "torch 2")
    assert report.device is not None
    assert report.data.eval is not None and report.data.eval.label_ids is not None
    written = ["junit.xml", "report.html", "report.json", "report.md"]
    assert sorted(p.name for p in (tmp_path / "here").iterdir()) == written
    assert "## Device" in (tmp_path / "here" / "report.md").read_text()


def test_noise_is_measured_not_hidden(tmp_path: Path) -> None:
    """An artifact that is a little off has the SQNR it has, against the stored FP32 outputs."""
    (result,) = run(fake_bundle(tmp_path / "out", noise=0.02), tmp_path / "here").results
    assert result.status == "ok"
    assert result.sqnr_db is not None and 20 < result.sqnr_db < 60
    assert result.details["golden_sqnr_db"] == pytest.approx(result.sqnr_db, abs=3)


def test_wrong_numbers_fail_on_the_golden_images(tmp_path: Path) -> None:
    """A runtime that computes something else is a failed row that says so, and exit code 3."""
    report = run(fake_bundle(tmp_path / "out", seed=1), tmp_path / "here")
    (result,) = report.results
    assert result.status == "failed"
    assert "golden images" in result.reason
    assert "where it was exported 40.0 dB" in result.reason
    assert exit_code(report, VerifyJob()) == 3


@pytest.mark.parametrize(
    ("fault", "state", "words"),
    [("crash", "failed", "SIGSEGV"), ("exit", "failed", "exit code 7"), ("error", "failed", "told to fail"),
     ("nan", "failed", "NaN"), ("missing", "not_run", "pip install")],
)  # fmt: skip
def test_what_goes_wrong_is_one_row(tmp_path: Path, fault: str, state: str, words: str) -> None:
    """A crash, an exit, an exception and NaN fail the row; an absent runtime is not_run with its command."""
    at = "open" if fault == "missing" else "infer"
    report = run(fake_bundle(tmp_path / "out", fault=fault, fault_at=at), tmp_path / "here")
    (result,) = report.results
    assert result.status == state
    assert words in result.reason
    assert result.latency_ms is None


def test_exit_codes(tmp_path: Path) -> None:
    """Where nothing could run: 3, nothing was verified. A broken --max-drop: 1, if the user gave one."""
    absent = run(fake_bundle(tmp_path / "a" / "out", fault="missing", fault_at="open"), tmp_path / "a" / "x")
    assert exit_code(absent, VerifyJob()) == 3
    some = msgspec.structs.replace(absent, results=(*absent.results, result()))
    assert exit_code(some, VerifyJob()) == 0
    assert exit_code(some, VerifyJob(require_run=True)) == 3
    worse = run(fake_bundle(tmp_path / "b" / "out", noise=0.2), tmp_path / "b" / "x", max_drop=0.5)
    assert worse.results[0].status == "ok"
    assert worse.results[0].top1_drop > 0.5
    assert exit_code(worse, VerifyJob(max_drop=0.5)) == 1
    assert exit_code(worse, VerifyJob()) == 0


def test_unlabelled_images(tmp_path: Path) -> None:
    """Without labels the row has agreement and SQNR, no top-1."""
    (result,) = run(fake_bundle(tmp_path / "out", labels=False), tmp_path / "here").results
    assert (result.status, result.top1, result.agreement) == ("ok", None, 1.0)


def test_a_target_that_is_not_there(tmp_path: Path) -> None:
    """--target names what the bundle has."""
    with pytest.raises(UsageError, match="it has onnx"):
        run(fake_bundle(tmp_path / "out"), tmp_path / "here", targets=("coreml",))


def test_a_refused_bundle_leaves_no_output(tmp_path: Path) -> None:
    """What is not a bundle gives InputError and no folder at --output."""
    with pytest.raises(InputError):
        run(tmp_path, tmp_path / "here")
    assert not (tmp_path / "here").exists()


def test_a_crashing_builder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vendor's builder that dies takes its process with it, not ours."""
    artifact = tmp_path / "model.onnx"
    monkeypatch.setitem(build_here.BUILDERS, "boom", ("os:_exit", ".trt.json"))
    with pytest.raises(WorkerCrash, match="boom builder ended"):
        build_here.build_here("boom", artifact, timeout=60)


def test_an_engine_is_built_from_the_bundled_graph(tmp_path: Path) -> None:
    """The real TensorRT-RTX builder, in its own process, makes the engine a device would run."""
    pytest.importorskip("tensorrt_rtx", reason="pip install 'vit-export[tensorrt-rtx]'")
    from contracts.trt_graphs import SIZE, save_linear
    from vit_export.export.trt_manifest import EngineBuild, GraphInput, manifest_path
    from vit_export.export.trt_options import TensorRtOptions

    graph = save_linear(tmp_path / "model.onnx", None)
    options = TensorRtOptions(compute_capabilities=("8.6",))
    stored = EngineBuild(manifest_path(graph), graph, GraphInput("images", SIZE), options)
    stored.manifest.write_text(json.dumps(stored.as_json()))
    engine = build_here.build_here("tensorrt", graph, timeout=200)
    assert engine == tmp_path / "model.engine"
    assert engine.stat().st_size > 1000
    graph.write_bytes(b"another graph")
    with pytest.raises(InputError, match="is not the graph"):
        build_here.build_here("tensorrt", graph, timeout=200)


def test_what_needs_no_building_is_opened_as_it_is(tmp_path: Path) -> None:
    """Runners without a builder get the stored file."""
    assert build_here.build_here("onnx", tmp_path / "model.onnx", timeout=1) == tmp_path / "model.onnx"


@pytest.mark.parametrize(
    ("precision", "expected", "noise_db", "passes"),
    [
        (Precision.INT8, 40.0, 20.0, True), (Precision.INT8, 40.0, 10.0, False),
        (Precision.INT8, 12.0, 7.0, True), (Precision.INT8, 12.0, 5.0, False),
        (Precision.INT8, None, 16.0, True), (Precision.FP16, 70.0, 35.0, True),
        (Precision.FP16, 70.0, 25.0, False), (Precision.FP32, 120.0, 65.0, True),
        (Precision.FP32, 120.0, 55.0, False),
    ],
)  # fmt: skip
def test_golden_limits(precision: Precision, expected: float | None, noise_db: float, passes: bool) -> None:
    """What is asked: 6 dB below what the export measured, and never more than the precision can promise."""
    artifact = StoredArtifact(
        target="onnx", precision=precision, image_size=(8, 8), path="a/b", bytes=1, runner="fake",
        sqnr_db=expected,
    )  # fmt: skip
    reference = np.random.default_rng(0).standard_normal((16, 10), dtype=np.float32)
    noise = np.random.default_rng(1).standard_normal((16, 10), dtype=np.float32)
    noise *= 10 ** (-noise_db / 20) * np.linalg.norm(reference) / np.linalg.norm(noise)
    if passes:
        found = verify_size._check_golden(artifact, reference, reference + noise)
        assert found == pytest.approx(noise_db, abs=0.1)
    else:
        with pytest.raises(verify_size.ParityError, match="golden"):
            verify_size._check_golden(artifact, reference, reference + noise)


def test_a_manifest_cannot_choose_where_the_report_goes(tmp_path: Path) -> None:
    """Files come to be in --output only: the bundle is left as it was hashed."""
    bundle = fake_bundle(tmp_path / "out")
    before = {p: p.read_bytes() for p in bundle.rglob("*") if p.is_file()}
    run(bundle, tmp_path / "here")
    assert {p: p.read_bytes() for p in bundle.rglob("*") if p.is_file()} == before
    assert json.loads((tmp_path / "here" / "report.json").read_text())["results"][0]["artifact"] is None


def test_runnables_take_the_asked_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--threads reaches every runtime."""
    seen: list[Runnable] = []
    real = verify_size.Worker

    def note(runnable: Runnable, **settings: Any) -> Any:
        seen.append(runnable)
        return real(runnable, **settings)

    monkeypatch.setattr(verify_size, "Worker", note)
    run(fake_bundle(tmp_path / "out"), tmp_path / "here", threads=3)
    assert {dataclasses.astuple(r)[2] for r in seen} == {3}
