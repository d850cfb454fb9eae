"""The report: its schema, its files, and what is refused on the way back in."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import jsonschema
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.sample_report import IMAGES, SIZE, report, result
from vit_export.errors import InputError, UsageError
from vit_export.runtime import report_files, report_schema
from vit_export.runtime.report_files import WRITERS, read, render, write
from vit_export.runtime.report_schema import SCHEMA_FILE, PackedIds, StageLoss, json_schema


def as_json(**changes: Any) -> dict[str, Any]:
    """The sample report as plain values, with top-level `changes`."""
    return json.loads(report_schema.encode(report())) | changes


def meaning(schema: bytes) -> object:
    """A schema without what versions of msgspec differ in: docstring indentation, order of alternatives."""

    def settle(part: dict[str, object]) -> dict[str, object]:
        return {name: sorted(value, key=str) if name == "anyOf" else value for name, value in part.items()}

    return json.loads(re.sub(r"(\\n|\s)+", " ", schema.decode()), object_hook=settle)


def test_shipped_schema_is_the_one_of_the_code():
    """report.schema.json is what the types generate: `python -m vit_export.runtime.report_schema`."""
    assert meaning(SCHEMA_FILE.read_bytes()) == meaning(json_schema())


def test_reports_validate_against_the_shipped_schema():
    """A report with every kind of row is valid, as written, by an independent validator."""
    schema = json.loads(SCHEMA_FILE.read_bytes())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(as_json())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda r: r.pop("model"),
        lambda r: r.update(extra=1),
        lambda r: r.update(schema="vit-export.report/9"),
        lambda r: r.update(created="yesterday"),
        lambda r: r["baseline"].update(top1=1.2),
        lambda r: r["baseline"].update(image_size=[224]),
        lambda r: r["results"][0].update(status="great"),
        lambda r: r["results"][0].update(bytes=-1),
        lambda r: r["results"][0].update(top1_drop=101),
        lambda r: r["results"][0].update(verdict="maybe"),
        lambda r: r["results"][0].update(latency_ms={"p50": 1}),
        lambda r: r["model"].update(preprocessing_sha256="xyz"),
        lambda r: r["results"][0].update(precision="int3"),
        lambda r: r["results"].append(None),
    ],
)
def test_schema_and_reader_refuse_the_same(tmp_path: Path, spoil):
    """What the JSON schema rejects, the reader rejects, as one InputError with the file's name."""
    values = as_json()
    spoil(values)
    validator = jsonschema.Draft202012Validator(
        json.loads(SCHEMA_FILE.read_bytes()), format_checker=jsonschema.FormatChecker()
    )
    if values["created"] != "yesterday":  # date-time is only checked where an extra package is present
        assert not validator.is_valid(values)
    (tmp_path / "report.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"report\.json") as caught:
        read(tmp_path / "report.json")
    assert "\n" not in caught.value.message


def test_design_field_names():
    """The names that design.md promises to users and CI are all there."""
    found = as_json()
    assert found.keys() >= {
        "schema",
        "created",
        "command",
        "environment",
        "model",
        "data",
        "baseline",
        "results",
    }
    assert found["results"][0].keys() >= {
        "target", "precision", "image_size", "status", "reason", "artifact", "bytes", "runtime_version",
        "latency_ms", "speedup", "speedup_vs_fp16", "top1", "top5", "top1_drop", "top1_drop_ci95",
        "agreement", "sqnr_db", "cosine", "images", "kept_float", "float_fallback_ops", "stages",
        "verdict", "verdict_reason", "gates",
    }  # fmt: skip
    assert found["results"][0]["latency_ms"].keys() == {
        "p50",
        "p90",
        "p99",
        "mean",
        "min",
        "runs",
        "unstable",
    }
    assert found["data"]["eval"].keys() >= {"path", "images", "labels", "sha256"}


def test_write_then_read_gives_the_same_report(tmp_path: Path):
    """Every format is written, and the JSON comes back equal, from the file or its folder."""
    made = report()
    paths = write(made, tmp_path / "out")
    assert [path.name for path in paths] == ["report.json", "report.md", "report.html", "junit.xml"]
    assert read(tmp_path / "out") == made
    assert read(tmp_path / "out" / "report.json") == made


def test_details_may_hold_numpy_and_paths():
    """Facts of a build are written as plain JSON; what has no plain form is an error, not a guess."""
    text = report_schema.encode(report(result(details={"n": np.int64(3), "path": Path("a") / "b"})))
    assert json.loads(text)["results"][0]["details"] == {"n": 3, "path": "a/b"}
    with pytest.raises(TypeError, match="object"):
        report_schema.encode(report(result(details={"x": object()})))


def test_nothing_is_written_if_one_format_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A format that cannot be rendered leaves no report half there."""
    monkeypatch.setitem(WRITERS, "md", ("report.md", "vit_export.runtime.report_schema:absent"))
    with pytest.raises(AttributeError):
        write(report(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="one of json, md, html, junit"):
        render(report(), "pdf")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[1]", "not a valid report"),
        (b"{}", "something else"),
        (b'{"schema": 3}', "not a valid report"),
        (b'{"schema": "vit-export.report/2"}', "vit-export.report/2"),
        (b'{"schema": "vit-export.report/1"}', "missing required field"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not a valid report"),
        (b'{"schema": "vit-export.report/1", "x": ' + b"[" * 100_000, "not JSON"),
    ],
)
def test_what_is_no_report_is_one_line(tmp_path: Path, content: bytes, words: str):
    """Anything else than a report, deeply nested text included, is one InputError, exit code 2."""
    path = tmp_path / "report.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        read(path)
    assert caught.value.exit_code == 2


def test_absent_and_huge_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """No file, a folder without one, and one beyond the size limit are named."""
    with pytest.raises(InputError, match="absent"):
        read(tmp_path / "absent.json")
    with pytest.raises(InputError, match=r"report\.json"):
        read(tmp_path)
    write(report(), tmp_path)
    monkeypatch.setattr(report_files, "MAX_BYTES", 100)
    with pytest.raises(InputError, match="too large"):
        read(tmp_path)


@given(st.lists(st.integers(-1, 2**31 - 1), max_size=200))
@settings(max_examples=50, deadline=None)
def test_packed_ids_come_back(ids: list[int]):
    """Class indices survive packing, the empty list included."""
    assert PackedIds.pack(np.array(ids, np.int64)).unpack().tolist() == ids


@pytest.mark.parametrize(
    "packed",
    [
        PackedIds(3, "not base64!"),
        PackedIds(3, "aGVsbG8="),
        PackedIds(3, PackedIds.pack([1, 2]).data),
        PackedIds(1, PackedIds.pack([1, 2]).data),
        PackedIds(1, PackedIds.pack(np.zeros(10_000_000)).data),  # a bomb: 40 MB behind one value
        PackedIds(2, PackedIds.pack([1, 2]).data[:-8]),
    ],
)
def test_damaged_packed_ids_are_refused(packed: PackedIds):
    """Text that is no base64, no zlib, cut off, or of another length is an input error."""
    with pytest.raises(InputError, match="packed"):
        packed.unpack()


def test_predictions_stay_compact():
    """A thousand predictions of a real-looking classifier take less than 2 KB."""
    ids = np.random.default_rng(0).integers(0, 1000, 1000)
    assert len(PackedIds.pack(ids).data) < 3000
    assert len(PackedIds.pack(np.arange(1000) // 100).data) < 200


def test_baseline_of_each_size():
    """With several image sizes each has its baseline, and an unknown size has none."""
    made = report()
    other = msgspec.structs.replace(made.baseline, image_size=(112, 96))
    made = msgspec.structs.replace(made, more_baselines=(other,))
    assert made.baseline_for(SIZE) is made.baseline
    assert made.baseline_for((112, 96)) == other
    assert made.baseline_for((1, 1)) is None


def test_markdown_is_a_table_and_escapes():
    """Each row has as many cells as the head, and a vendor's message cannot add markup or cells."""
    text = render(report(), "md").decode()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert "<b>" not in text
    assert "\x1b" not in text
    assert "hold: int8 is 0.93x the speed of fp16 here" in text
    assert "```\nvit-export --target onnx --int8\n```" in text


def test_markdown_tells_stages_and_float_layers():
    """Where the loss came from and what stayed float are in the report."""
    one = result(
        stages=(StageLoss(stage="quantize", sqnr_db=24.0, agreement=0.98),), kept_float=("blocks.0.mlp",)
    )
    text = render(report(one), "md").decode()
    assert "stage quantize: 24.0 dB, agreement 0.980" in text
    assert "kept float: blocks.0.mlp" in text


def test_junit_counts_and_states():
    """A failed artifact is an error, one not run is skipped, a broken gate fails; totals add up."""
    root = ET.fromstring(render(report(), "junit"))
    assert {suite.get("name") for suite in root} == {"onnx", "openvino", "tensorrt", "coreml"}
    assert (root.get("failures"), root.get("errors"), root.get("skipped")) == ("1", "1", "1")
    assert int(root.get("tests", 0)) == len(root.findall(".//testcase")) == 6 + 4
    assert "SIGSEGV" in root.find(".//error").get("message")


@pytest.mark.skipif(os.name != "posix", reason="needs a device that is always full")
def test_full_disk_is_one_clear_error(tmp_path: Path):
    """Where nothing can be written the error names the file and is a usage error."""
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(UsageError, match=r"report\.json"):
        write(report(), tmp_path / "out")


def test_sample_is_what_it_claims():
    """The sample has labels and predictions for each image, so that paired tests have something to pair."""
    made = report()
    assert made.data.eval.label_ids.unpack().shape == (IMAGES,)
    assert all(r.predictions is None or r.predictions.count == IMAGES for r in made.results)
