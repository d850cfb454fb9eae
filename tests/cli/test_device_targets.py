"""Targets whose device is not here, through the whole job: what is written, run, said and not claimed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vit_export import one_size, pipeline
from vit_export.artifacts import Precision
from vit_export.export.trt_sdk import why_not_here
from vit_export.job import ExportJob
from vit_export.runtime.bundle_manifest import decode
from vit_export.runtime.console import make_console, print_report
from vit_export.runtime.coreml_interpreter import Interpreter
from vit_export.runtime.coreml_runner import REFERENCE
from vit_export.runtime.latency import Timings
from vit_export.runtime.report_schema import Report, Result

SIZES = ((96, 96), (64, 64))


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """digits-vit in fp16 for TensorRT and Core ML at two sizes; nothing is timed."""

    def untimed(runnables: Any, **settings: Any) -> Timings:
        return Timings({name: (np.array([1_000_000]),) for name in runnables})

    folder = tmp_path_factory.mktemp("device-targets") / "out"
    job = ExportJob(
        targets=("tensorrt", "coreml"), precisions=(Precision.FP16,), image_sizes=SIZES, eval_size=16,
        output=folder, options={"trt_flavor": "rtx"},
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_size, "alternate", untimed)
        pipeline.run(job, "vit-export --fp16")
    return folder


@pytest.fixture(scope="module")
def report(output: Path) -> Report:
    from vit_export.runtime.report_files import read

    return read(output)


def of(report: Report, target: str) -> tuple[Result, ...]:
    return tuple(result for result in report.results if result.target == target)


@pytest.mark.skipif(not why_not_here(), reason="a GPU is here: the engines run")
def test_an_engine_that_cannot_run_has_the_numbers_of_its_graph(report: Report) -> None:
    """Without a GPU: built, not_run with the reason, and the graph judged with float16 rounded."""
    for result in of(report, "tensorrt"):
        assert result.status == "not_run" and "GPU" in result.reason and result.verdict is None
        assert result.latency_ms is None and result.sqnr_db is None
        assert result.details["graph"]["sqnr_db"] > 50 and result.details["graph"]["images"] == 16
        assert result.details["ranges_from"] == "8 evaluation images"


def test_what_resizing_and_float16_cost_is_told_apart(report: Report) -> None:
    """float16 alone, in PyTorch, explains the loss of the graph; only the size that is not the model's own
    has a line for resizing, and digits keep most of their classes through it."""
    for result in report.results:
        stages = {stage.stage: stage for stage in result.stages}
        last = "lower" if result.target == "tensorrt" else "runtime"
        resized = () if result.image_size == SIZES[0] else ("resize",)
        assert tuple(stages) == (*resized, "fp16", last)
        assert 50 < (stages["fp16"].sqnr_db or 0) < 80 and stages["fp16"].agreement == 1.0
    assert stages["resize"].agreement is not None and 0.5 < stages["resize"].agreement <= 1.0
    assert (stages["resize"].sqnr_db or 0) < 40


def test_the_terminal_says_how_to_do_it_by_hand(report: Report, capsys: pytest.CaptureFixture[str]) -> None:
    """One trtexec line for TensorRT 10 and one for 11, whole and on a line of its own."""
    print_report(report, make_console())
    lines = capsys.readouterr().out.splitlines()
    ten = [line for line in lines if "TensorRT 10, " in line and "--stronglyTyped" in line]
    eleven = [line for line in lines if "TensorRT 11, " in line and "--stronglyTyped" not in line]
    assert len(ten) == len(eleven) == len(SIZES)
    assert all(line.endswith("--useCudaGraph") for line in (*ten, *eleven))


def test_sizes_are_functions_of_one_package(output: Path, report: Report) -> None:
    """Both sizes point at one package that is smaller than two; the single ones are gone."""
    results = of(report, "coreml")
    assert [r.details["function"] for r in results] == ["size_96x96", "size_64x64"]
    assert {r.artifact for r in results} == {"coreml/fp16/sizes/model.mlpackage"}
    assert [p.name for p in (output / "coreml/fp16").iterdir()] == ["sizes"]
    package = output / "coreml/fp16/sizes/model.mlpackage"
    assert Interpreter(package).function_names == ("size_96x96", "size_64x64")
    assert all("weights shared" in result.notes[0] for result in results)


def test_the_bundle_carries_the_package_once(output: Path) -> None:
    """A device opens each size as its function of the one package."""
    manifest = decode((output / "bundle/manifest.json").read_bytes(), "bundle")
    stored = [artifact for artifact in manifest.artifacts if artifact.target == "coreml"]
    assert {a.path for a in stored} == {"coreml/fp16/sizes/model.mlpackage"}
    assert [a.options for a in stored] == [{"function": "size_96x96"}, {"function": "size_64x64"}]
    assert sum(file.path.endswith("weight.bin") for file in manifest.files) == 1


def test_the_interpreter_is_named_as_such(report: Report, output: Path) -> None:
    """Numbers of the reference interpreter are labelled, and it has no latency."""
    for result in of(report, "coreml"):
        assert result.status == "ok" and result.agreement == 1.0 and result.latency_ms is None
        assert REFERENCE in (result.runtime_version or "") and REFERENCE in result.verdict_reason
    assert REFERENCE in (output / "report.md").read_text()
    assert REFERENCE in json.dumps(json.loads((output / "report.json").read_text()))
