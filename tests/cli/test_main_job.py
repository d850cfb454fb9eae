"""The main job on the embedded default, as a user runs it."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import jsonschema
import onnx
import pytest

from vit_export.runtime import report_files
from vit_export.runtime.report_schema import json_schema


@pytest.fixture(scope="session")
def report(exported: Path) -> dict[str, Any]:
    """report.json of the shared export."""
    data: dict[str, Any] = json.loads((exported / "report.json").read_text())
    return data


def test_report_fits_its_schema(report: dict[str, Any]) -> None:
    """report.json of a real run validates against the schema the package ships."""
    jsonschema.validate(report, json.loads(json_schema()))


def test_both_targets_are_verified(report: dict[str, Any]) -> None:
    """Each target ran, was timed against PyTorch and compared with it on every image."""
    assert [r["target"] for r in report["results"]] == ["onnx", "openvino"]
    for result in report["results"]:
        assert result["status"] == "ok" and result["images"] == 300
        assert result["latency_ms"]["runs"] >= 50 and result["speedup"] > 0
        assert result["agreement"] >= 0.95 and result["sqnr_db"] > 25
        assert result["top1_drop"] <= 0.5  # points; one image of 300 is 0.33
        assert result["verdict"] in ("ship", "hold") and result["verdict_reason"]


def test_every_linear_is_integer_in_onnx_runtime(report: dict[str, Any]) -> None:
    """The report's count of float linears in ONNX Runtime's optimised graph is zero."""
    onnx_result = report["results"][0]
    assert onnx_result["float_fallback_ops"] == 0 and onnx_result["details"]["integer_linears"] > 10


def test_losses_are_blamed_on_stages(report: dict[str, Any]) -> None:
    """Quantisation, lowering and runtime are listed; lowering alone costs next to nothing."""
    stages = {s["stage"]: s["sqnr_db"] for s in report["results"][0]["stages"]}
    assert list(stages) == ["quantize", "lower", "runtime"]
    assert stages["lower"] is None or stages["lower"] > stages["quantize"]


def test_artifacts_are_where_the_report_says(exported: Path, report: dict[str, Any]) -> None:
    """Paths are relative, files exist, and no scratch is left."""
    for result in report["results"]:
        assert (exported / result["artifact"]).is_file() and result["bytes"] > 100_000
    assert not [p.name for p in exported.rglob("*") if p.name.startswith(".")]


def test_preprocessing_travels_with_the_artifact(exported: Path, report: dict[str, Any]) -> None:
    """The contract and its hash are in the ONNX file's metadata and in the report."""
    model = onnx.load(str(exported / report["results"][0]["artifact"]))
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["preprocessing_sha256"] == report["model"]["preprocessing_sha256"]
    assert json.loads(metadata["preprocessing"])["size"] == report["baseline"]["image_size"]
    assert [value.name for value in model.graph.output] == ["logits"]


def test_other_formats_are_written(exported: Path) -> None:
    """Markdown has a row an artifact, JUnit a case an artifact."""
    assert "onnx int8" in (exported / "report.md").read_text()
    cases = list(ET.parse(exported / "junit.xml").iter("testcase"))
    assert len(cases) >= 2


def test_gate_accepts_a_report_against_itself(exported: Path, tmp_path: Path, vit_export: Any) -> None:
    """A report gated against itself is green: no regression in accuracy, time or size."""
    summary = tmp_path / "summary.md"
    run = vit_export("gate", exported, "--baseline", exported / "report.json", "--summary", summary)
    lines = summary.read_text().splitlines()
    assert run.code == 0 and not any("failed" in line for line in lines)
    assert len([line for line in lines if "top1_regression" in line and "passed" in line]) == 2


def test_report_writes_its_formats_again(exported: Path, tmp_path: Path, vit_export: Any) -> None:
    """`report` needs nothing but report.json."""
    (tmp_path / "report.json").write_bytes((exported / "report.json").read_bytes())
    run = vit_export("report", tmp_path)
    assert run.code == 0 and "pytorch" in run.out
    assert (tmp_path / "report.md").read_text() == (exported / "report.md").read_text()


def test_json_goes_to_stdout_alone(vit_export: Any, tmp_path: Path) -> None:
    """--json prints a readable report on stdout and keeps the table away from it."""
    run = vit_export("--json", "--output", tmp_path / "o", "--eval-size", 20)
    assert run.code == 0 and json.loads(run.out)["results"][0]["precision"] == "fp32"
    assert report_files.read(tmp_path / "o").baseline.top1 is not None
    assert "pytorch" in run.err


def test_a_config_file_gives_defaults(vit_export: Any, tmp_path: Path) -> None:
    """Options come from TOML; a wrong key is refused; the command line wins."""
    config = tmp_path / "c.toml"
    config.write_text('target = ["nope"]\nimage-size = ["96"]\n')
    run = vit_export("--config", config, "--output", tmp_path / "o")
    assert run.code == 2 and "unknown target 'nope'" in run.err
    run = vit_export("--config", config, "--target", "onnx", "--image-size", "97", "--output", tmp_path / "o")
    assert run.code == 2 and "97x97" in run.err
    config.write_text("tarqet = 1\n")
    run = vit_export("--config", config)
    assert run.code == 2 and "unknown key tarqet" in run.err


def test_max_drop_turns_the_exit_code(vit_export: Any, tmp_path: Path) -> None:
    """A limit no artifact can keep gives exit 1, with all artifacts and the report in place.

    The report names what every layer kept float in vain bought, and its milliseconds: they add up.
    """
    few = ("--calib-method", "minmax", "--calib-size", 16, "--eval-size", 20)
    run = vit_export("--int8", "--max-drop", "-5", *few, "--output", tmp_path / "o", "--quiet")
    assert run.code == 1 and "over the limit" in run.out
    result = json.loads((tmp_path / "o/report.json").read_text())["results"][0]
    cost = result["details"]["kept_float_cost"]
    assert sorted(cost["layers"]) == sorted(result["kept_float"]) and len(cost["layers"]) > 10
    assert sum(cost["layers"].values()) == pytest.approx(cost["ms"]) and cost["of_ms"] > 0
    (note,) = (note for note in result["notes"] if note.startswith("kept float within --max-drop"))
    assert "blocks.0.mlp.fc1 (" in note and "dB if it alone were int8" in note and "measured" in note
