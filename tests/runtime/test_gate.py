"""The gate: green against itself, red for a real loss, undecided with few images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from contracts.sample_report import latency, report, result
from vit_export.artifacts import Precision
from vit_export.errors import InputError
from vit_export.runtime.gate import GateOutcome, gate, markdown
from vit_export.runtime.gate_metrics import METRICS
from vit_export.runtime.gate_rules import Rule, Rules, default_rules, read_rules
from vit_export.runtime.report_schema import Data, EvalData, PackedIds, Report


def one(images: int = 400, wrong: int = 0, **changes: Any) -> Report:
    """A report of one int8 artifact that gets `wrong` of `images` labelled images wrong."""
    labels = np.arange(images) % 10
    predicted = np.where(np.arange(images) < wrong, (labels + 1) % 10, labels)
    data = EvalData(
        path="e", images=images, sha256=f"{images:064x}", labels=True, label_ids=PackedIds.pack(labels)
    )
    made = result(images=images, predictions=PackedIds.pack(predicted), **changes)
    return report(made, data=Data(eval=data))


def rules(*rule: dict[str, Any], **more: Any) -> Rules:
    """Rules as a TOML file would give them."""
    return msgspec.convert({"rule": rule, **more}, Rules)


def states(outcome: GateOutcome) -> dict[str, str]:
    """Metric → outcome, for one artifact."""
    return {check.rule.metric: check.outcome for check in outcome.checks}


def test_green_against_itself():
    """A report gated against itself passes every default rule."""
    found = gate(one(), one())
    assert (found.outcome, found.exit_code) == ("passed", 0)
    assert states(found).keys() == {r.metric for r in default_rules(baseline=True).rule}


def test_red_for_two_points_lost():
    """Eight more wrong of 400 is a real regression: exit code 1, and the check says by how much."""
    found = gate(one(wrong=8), one())
    assert (found.outcome, found.exit_code) == ("failed", 1)
    check = next(c for c in found.checks if c.rule.metric == "top1_regression")
    assert (check.outcome, check.value) == ("failed", pytest.approx(2.0))


def test_as_many_won_as_lost_is_no_regression():
    """Predictions may change; only a net loss that is more than chance turns the build red."""
    swapped, base = one(wrong=8), one()
    ids = base.results[0].predictions.unpack()
    ids[-8:] = (ids[-8:] + 1) % 10
    base = msgspec.structs.replace(
        base, results=(msgspec.structs.replace(base.results[0], predictions=PackedIds.pack(ids)),)
    )
    found = gate(swapped, base, rules({"metric": "top1_regression", "max": 1.0}))
    assert found.outcome == "inconclusive"
    assert found.checks[0].value == pytest.approx(0)


@pytest.mark.parametrize("exit_code", [0, 1, 7])
def test_thirty_images_decide_nothing(exit_code: int):
    """With 30 images even an identical report is undecided; the file says what that exits with."""
    paired = {"metric": "top1_regression", "max": 1.0}
    found = gate(one(30), one(30), rules(paired, inconclusive_exit=exit_code))
    assert (found.outcome, found.exit_code) == ("inconclusive", exit_code)
    assert "30 images are too few, about" in found.checks[0].reason
    assert gate(one(30, wrong=1), one(30), rules(paired)).outcome == "inconclusive"


def test_a_failure_outweighs_doubt():
    """One failed and one undecided rule is red."""
    both = rules({"metric": "top1_regression", "max": 1}, {"metric": "bytes", "max": 1}, inconclusive_exit=5)
    assert gate(one(30), one(30), both).exit_code == 1


@pytest.mark.parametrize(
    ("rule", "changes", "expected"),
    [
        ({"metric": "top1_drop", "max": 1.0}, {"top1_drop": 0.2, "top1_drop_ci95": (-0.1, 0.5)}, "passed"),
        ({"metric": "top1_drop", "max": 1.0}, {"top1_drop": 2.0, "top1_drop_ci95": (0.3, 3.7)}, "failed"),
        (
            {"metric": "top1_drop", "max": 1.0},
            {"top1_drop": 2.0, "top1_drop_ci95": (-0.3, 4.3)},
            "inconclusive",
        ),
        (
            {"metric": "top1_drop", "max": 1.0},
            {"top1_drop": 0.2, "top1_drop_ci95": (-1.0, 1.4)},
            "inconclusive",
        ),
        (
            {"metric": "top1_drop", "max": -1.0},
            {"top1_drop": 0.0, "top1_drop_ci95": (-0.5, 0.5)},
            "inconclusive",
        ),
        ({"metric": "agreement", "min": 0.98}, {}, "passed"),
        ({"metric": "agreement", "min": 0.99}, {}, "failed"),
        ({"metric": "sqnr_db", "min": 22}, {}, "passed"),
        ({"metric": "speedup", "min": 2.5}, {}, "failed"),
        ({"metric": "p50_ms", "max": 50}, {}, "passed"),
        ({"metric": "p99_ms", "max": 50}, {}, "failed"),
        ({"metric": "p99_ms", "max": 50}, {"latency_ms": latency(40, unstable=True)}, "inconclusive"),
        ({"metric": "bytes", "max": 21_900_000}, {}, "passed"),
        ({"metric": "bytes", "max": 21_899_999}, {}, "failed"),
    ],
)
def test_absolute_rules(rule: dict[str, Any], changes: dict[str, Any], expected: str):
    """Each metric is read from the report and held against max or min, both inclusive."""
    assert states(gate(one(**changes), rules=rules(rule))) == {rule["metric"]: expected}


@pytest.mark.parametrize(
    ("rule", "changes", "expected"),
    [
        ({"metric": "latency_ratio", "max": 1.1}, {"latency_ms": latency(43.0)}, "passed"),
        ({"metric": "latency_ratio", "max": 1.1}, {"latency_ms": latency(45.0)}, "failed"),
        ({"metric": "latency_ratio", "max": 1.1}, {"latency_ms": latency(45, unstable=True)}, "inconclusive"),
        ({"metric": "p99_ratio", "max": 1.1}, {"latency_ms": latency(45.0)}, "failed"),
        ({"metric": "bytes_ratio", "max": 1.5}, {"bytes": 40_000_000}, "failed"),
        ({"metric": "changed", "max": 0.0}, {}, "passed"),
    ],
)
def test_relative_rules(rule: dict[str, Any], changes: dict[str, Any], expected: str):
    """Ratios are of this report to the baseline report's same artifact."""
    assert states(gate(one(**changes), one(), rules(rule))) == {rule["metric"]: expected}


def test_other_machines_are_not_compared():
    """A slower latency on another processor, or with other threads, does not turn the build red."""
    slow, base = one(latency_ms=latency(90)), one()
    rule = rules({"metric": "latency_ratio", "max": 1.1})
    for change in ({"cpu": "Another CPU"}, {"threads": 8}):
        environment = msgspec.structs.replace(base.environment, **change)
        moved = msgspec.structs.replace(base, environment=environment)
        found = gate(slow, moved, rule)
        assert found.outcome == "inconclusive"
        assert "the baseline ran" in found.checks[0].reason


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"metric": "top1_drop", "max": 1, "target": "tensorrt"}, "matches nothing"),
        ({"metric": "top1_drop", "max": 1, "precision": "fp*"}, "matches nothing"),
        ({"metric": "speedup_vs_fp16", "min": 1}, "has no speedup_vs_fp16"),
        ({"metric": "latency_ratio", "max": 1}, "--baseline"),
    ],
)
def test_rules_about_nothing_are_input_errors(rule: dict[str, Any], words: str):
    """A rule whose artifact, value or baseline is not there is the user's mistake, never green."""
    with pytest.raises(InputError) as caught:
        gate(one(), rules=rules(rule))
    assert words in str(caught.value)


def test_baseline_without_the_artifact():
    """A required relative rule names the artifact the baseline lacks; an optional one passes over it."""
    base = report(result(precision=Precision.FP16))
    with pytest.raises(InputError, match="onnx int8 224x224"):
        gate(one(), base, rules({"metric": "bytes_ratio", "max": 1}))
    optional = rules({"metric": "bytes_ratio", "max": 1, "required": False}, {"metric": "bytes", "min": 0})
    assert states(gate(one(), base, optional)) == {"bytes": "passed"}


def test_paired_rules_need_the_same_images():
    """Predictions on other images, or not one an image, are refused rather than paired."""
    paired = rules({"metric": "top1_regression", "max": 1})
    with pytest.raises(InputError, match="other images"):
        gate(one(400), one(300), paired)
    short = one()
    cut = msgspec.structs.replace(short.results[0], predictions=PackedIds.pack(np.zeros(399, int)))
    with pytest.raises(InputError, match="one prediction an image"):
        gate(msgspec.structs.replace(short, results=(cut,)), one(), paired)


def test_failed_and_unrun_artifacts():
    """A failed artifact fails its rules; one not run here is listed and decides nothing."""
    mixed = report(result(), result(target="tensorrt", status="not_run", reason="no GPU", top1_drop=None))
    found = gate(mixed, rules=rules({"metric": "top1_drop", "max": 1}))
    assert [check.outcome for check in found.checks] == ["passed", "not_run"]
    assert found.outcome == "passed"
    only = report(result(status="not_run", reason="no GPU"))
    assert gate(only, rules=rules({"metric": "top1_drop", "max": 1})).outcome == "inconclusive"
    failed = report(result(status="failed", reason="it died"))
    assert gate(failed, rules=rules({"metric": "top1_drop", "max": 1})).exit_code == 1


def test_checks_become_gates_of_the_report():
    """The judged report carries rule, value, limit and outcome, for junit.xml and report.md."""
    found = gate(one(wrong=8), one())
    gates = {g.rule: g.passed for g in found.report.results[0].gates}
    assert gates["top1_regression <= 1"] is False
    assert gates["bytes_ratio <= 1.1"] is True
    undecided = gate(one(30), rules=rules({"metric": "top1_drop", "max": 0.3}))
    assert undecided.report.results[0].gates[0].passed is None
    assert "| onnx int8 224x224 | top1_regression &lt;= 1 | 2 | failed |" in markdown(found)


def test_rules_from_toml(tmp_path: Path):
    """The documented file is read, globs select, and only one side is given."""
    path = tmp_path / "rules.toml"
    path.write_text(
        'inconclusive_exit = 3\n[[rule]]\nmetric = "top1_drop"\nmax = 0.5\ntarget = "onnx*"\n'
        'precision = "int8"\nimage_size = "224x*"\n[[rule]]\nmetric = "speedup"\nmin = 2\nrequired = false\n'
    )
    found = read_rules(path)
    assert found.inconclusive_exit == 3
    assert [rule.name for rule in found.rule] == ["top1_drop <= 0.5", "speedup >= 2"]
    assert found.rule[0].matches(result())
    assert not found.rule[0].matches(result(image_size=(384, 384)))
    assert not found.rule[0].matches(result(target="openvino"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[rule]\n", "not TOML"),
        ("", "rule"),
        ("rule = []", "no rule given"),
        ('[[rule]]\nmetric = "top1_drop"', "either max or min"),
        ('[[rule]]\nmetric = "top1_drop"\nmax = 1\nmin = 0', "either max or min"),
        ('[[rule]]\nmetric = "speling"\nmax = 1', "unknown metric"),
        ('[[rule]]\nmetric = "bytes"\nmax = "1"', "Expected"),
        ('[[rule]]\nmetric = "bytes"\nmax = 1\nlimt = 2', "limt"),
        ('inconclusive_exit = 300\n[[rule]]\nmetric = "bytes"\nmax = 1', "0..255"),
        ("x = " + "[" * 5000, "not TOML"),
    ],
)
def test_bad_rule_files_are_one_line(tmp_path: Path, text: str, words: str):
    """A misspelt metric or key, both sides or none, and broken TOML are told with the file's name."""
    path = tmp_path / "rules.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"rules\.toml") as caught:
        read_rules(path)
    assert words in caught.value.message


def test_absent_or_undecodable_rules(tmp_path: Path):
    """No file and no UTF-8 are input errors too."""
    with pytest.raises(InputError, match=r"absent\.toml"):
        read_rules(tmp_path / "absent.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not TOML"):
        read_rules(tmp_path / "binary.toml")


def test_every_metric_reads_the_sample():
    """Each metric of the table yields a number on a report that has everything."""
    full = one(speedup_vs_fp16=1.2, peak_rss_bytes=1)
    for name, metric in METRICS.items():
        found = gate(full, one(), rules({"metric": name, "max": 1e12}))
        assert found.checks[0].value is not None, name
        assert metric.meaning


def test_rule_names_are_readable():
    """A rule reads as a condition."""
    assert Rule(metric="bytes", max=5e6).name == "bytes <= 5e+06"
