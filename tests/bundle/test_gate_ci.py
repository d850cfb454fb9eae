"""The gate in CI on real reports of the default model: green, red, undecided, and what CI systems get."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from contracts.bundles import fake_bundle
from contracts.sample_report import report, result
from vit_export import cli
from vit_export.runtime import gate_annotations, report_files
from vit_export.runtime.bundle_open import open_bundle
from vit_export.runtime.gate import gate
from vit_export.runtime.verify import VerifyJob, verify, workspace

RULES = """inconclusive_exit = 7
[[rule]]
metric = "top1_regression"
max = 1.0
"""


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One paired rule, with an exit code of its own for `inconclusive`."""
    path = tmp_path_factory.mktemp("rules") / "gate.toml"
    path.write_text(RULES)
    return path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """`vit-export gate ...` in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["vit-export", "gate", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


@pytest.fixture(scope="module")
def worse_export(device_export: Any, export_with: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same export from weights perturbed until at least two points are lost."""
    folder = tmp_path_factory.mktemp("worse")
    checkpoint = folder / "perturbed.safetensors"
    _perturb(device_export.output, checkpoint)
    return export_with(folder / "out", checkpoint)


def _perturb(output: Path, checkpoint: Path) -> None:
    """Seeded noise on every matrix, as little as makes FP32 lose two points on the bundled digits."""
    import torch
    from safetensors.torch import load_file, save_file
    from timm.models.vision_transformer import VisionTransformer

    from vit_export.artifacts import Preprocessing
    from vit_export.calibration.images import open_images
    from vit_export.calibration.preprocess import to_pixels
    from vit_export.data import DIGITS_IMAGES, DIGITS_VIT_WEIGHTS, digits_vit_config

    contract: Preprocessing = report_files.read(output).model.preprocessing
    source = open_images(DIGITS_IMAGES, limit=300, seed=0, split="eval")
    pixels = np.stack([to_pixels(image, contract) for image in source.images()])
    images = torch.from_numpy(contract.normalize(pixels))
    model = VisionTransformer(**digits_vit_config()["timm_kwargs"]).eval()
    weights = {name: value.float() for name, value in load_file(DIGITS_VIT_WEIGHTS).items()}

    def top1(scale: float) -> float:
        generator = torch.Generator().manual_seed(0)
        for name, value in weights.items():
            noise = scale * value.std() * torch.randn(value.shape, generator=generator)
            model.get_parameter(name).data = value + noise if value.ndim > 1 else value
        with torch.inference_mode():
            logits = torch.cat([model(part) for part in images.split(50)])
        return float(np.mean(logits.argmax(1).numpy() == source.labels))

    before = top1(0.0)
    for scale in np.arange(0.4, 3.0, 0.1):
        if before - top1(float(scale)) >= 0.025:
            save_file({name: p.detach().contiguous() for name, p in model.named_parameters()}, checkpoint)
            return
    raise AssertionError("no noise made it worse")


def test_green_against_itself(device_export: Any, rules: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default model's report against itself passes the default rules and the paired one: exit 0."""
    assert run(monkeypatch, device_export.output, "--baseline", device_export.output) == 0
    assert run(monkeypatch, device_export.output, "--baseline", device_export.output, "--rules", rules) == 0


def test_red_for_perturbed_weights(
    device_export: Any, worse_export: Any, rules: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A copy that lost two points is red, in the exit code, on stdout, in JUnit, summary and Code Quality."""
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    (tmp_path / "summary.md").write_text("before\n")
    code = run(
        monkeypatch, worse_export.output, "--baseline", device_export.output, "--rules", rules,
        "--junit", tmp_path / "gate.xml", "--code-quality", tmp_path / "quality.json",
    )  # fmt: skip
    assert code == 1
    out = capfd.readouterr().out
    assert "gate: failed" in out
    (line,) = [line for line in out.splitlines() if line.startswith("::")]
    assert line.startswith(
        "::error title=vit-export gate%3A onnx int8 96x96::top1_regression <= 1: failed at"
    )
    summary = (tmp_path / "summary.md").read_text()
    assert summary.startswith("before\n")
    assert "| onnx int8 96x96 | top1_regression" in summary
    suites = ET.parse(tmp_path / "gate.xml").getroot()
    assert int(suites.get("failures", "0")) == 1
    (finding,) = json.loads((tmp_path / "quality.json").read_text())
    assert finding["severity"] == "critical"
    assert finding["location"]["path"] == str(rules)
    lost = next(c for c in gate(*map(report_files.read, (worse_export.output, device_export.output))).checks
                if c.rule.metric == "top1_regression")  # fmt: skip
    assert lost.value is not None and lost.value >= 2.0


def test_inconclusive_with_thirty_images(
    device_export: Any, rules: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device's report of the bundle's thirty images, against itself, decides nothing: the rules' exit."""
    output = tmp_path / "here"
    with workspace(output) as work:
        verify(open_bundle(device_export.bundle, work), VerifyJob(targets=("onnx",)), output, work)
    assert report_files.read(output).results[0].images == 30
    assert run(monkeypatch, output, "--baseline", output, "--rules", rules) == 7


def test_a_device_report_pairs_with_the_exports(tmp_path: Path) -> None:
    """With all evaluation images in the bundle, the device's report gates against the export's own."""
    path = fake_bundle(tmp_path / "out", noise=0.02)
    with workspace(tmp_path / "here") as work:
        device = verify(open_bundle(path, work), VerifyJob(), tmp_path / "here", work)
    assert device.data.eval is not None
    assert device.data.eval.sha256 == "1" * 64
    exported = report(
        result(image_size=(32, 32), images=40, predictions=device.baseline.predictions), data=device.data
    )
    found = {check.rule.metric for check in gate(device, exported).checks}
    assert "top1_regression" in found


def test_annotations_cannot_be_forged() -> None:
    """What a report says stays text: no new line, no second command, whatever a vendor's message holds."""
    evil = "boom\n::error::forged %0A\r::set-output name=x::y"
    outcome = gate(report(result(status="failed", reason=evil)))
    lines = list(gate_annotations.github(outcome))
    assert lines
    assert all("\n" not in line and "\r" not in line for line in lines)
    assert all(line.count("::error title=") == 1 and line.startswith("::error title=") for line in lines)
    assert "%250A" in lines[0]
    findings = json.loads(gate_annotations.gitlab(outcome, "gate.toml"))
    assert len({finding["fingerprint"] for finding in findings}) == len(findings) > 0


def test_passing_checks_are_silent() -> None:
    """Nothing is annotated that needs nobody's eyes."""
    fine = gate(report(result()))
    assert fine.outcome == "passed"
    assert list(gate_annotations.github(fine)) == []
    assert json.loads(gate_annotations.gitlab(fine, "x")) == []
