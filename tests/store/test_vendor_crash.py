"""A vendor's build step that crashes or hangs is one failed row of an export, whichever target's it is."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vit_export import one_size, pipeline
from vit_export.artifacts import Precision
from vit_export.calibration.observers import MinMaxConfig
from vit_export.export import child
from vit_export.job import ExportJob
from vit_export.runtime.latency import Timings
from vit_export.runtime.report_schema import Report
from vit_export.search.choices import Choices

HERE = str(Path(__file__).parent)


@pytest.fixture
def export(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Report]:
    """An int8 export for targets whose build step is replaced by one of `steps`."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (HERE, os.environ.get("PYTHONPATH")))))
    monkeypatch.syspath_prepend(HERE)
    real = child.in_child
    timings = Timings({"pytorch": (np.full(50, 1_000_000),)})
    monkeypatch.setattr(one_size, "alternate", lambda *_, **__: timings)

    def run(step: str, targets: tuple[str, ...], only: str = "", **changes: Any) -> Report:
        import steps

        def instead(vendors: Any, *, timeout: float, what: str) -> Callable[..., Any]:
            if only not in vendors.__name__:
                return vendors
            return lambda *_, **__: real(getattr(steps, step), timeout=timeout, what=what)()

        monkeypatch.setattr(child, "in_child", instead)
        job = ExportJob(
            targets=targets, precisions=(Precision.INT8,), eval_size=8, calib_size=4, threads=1,
            bundle_images=None, output=tmp_path, choices=Choices(MinMaxConfig()), resume=False,
        )  # fmt: skip
        return pipeline.run(replace(job, **changes))

    return run


def test_a_crash_is_a_row(export: Callable[..., Report], tmp_path: Path) -> None:
    """All four vendors' steps die with SIGSEGV: four failed rows that say so, a report, no artifact."""
    targets = ("onnx", "openvino", "tensorrt", "coreml")
    report = export("crash", targets)
    assert [result.target for result in report.results] == list(targets)
    for result in report.results:
        assert result.status == "failed" and "died with SIGSEGV" in result.reason
        assert "last words: vendor: about to fail" in result.reason
        assert not [path for path in (tmp_path / result.target).rglob("*") if path.is_file()]
    assert report.baseline.top1 is not None and (tmp_path / "report.html").exists()


def test_a_hang_is_a_row(export: Callable[..., Report]) -> None:
    """A step that does not end within --timeout is killed, and its row says how to give it more."""
    (result,) = export("hang", ("coreml",), timeout=60.0).results
    assert result.status == "failed"
    assert "the Core ML conversion did not end within 60 s" in result.reason


def test_packages_that_cannot_be_joined_stay_apart(export: Callable[..., Report], tmp_path: Path) -> None:
    """A crash while sizes are joined in one Core ML package leaves one package a size, and says so."""
    sizes = {"image_sizes": ((48, 48), (64, 64)), "precisions": (Precision.FP16,)}
    report = export("crash", ("coreml",), "combine", **sizes)
    for result in report.results:
        assert result.status == "ok" and (tmp_path / str(result.artifact)).exists()
        assert "in one Core ML package died with SIGSEGV" in result.notes[-1]
    assert len({result.artifact for result in report.results}) == 2
