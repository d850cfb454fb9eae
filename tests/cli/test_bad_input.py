"""Wrong input is one clear line, the right exit code, and nothing half-written."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vit_export.data import DIGITS_IMAGES

FACTORY = textwrap.dedent(
    """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10))
            self.bad = Bad()
            self.img_size = 16
        def forward(self, x):
            return self.body(x) + self.bad(x)

    class Bad(nn.Module):
        def forward(self, x):
            return {expression}

    def make():
        torch.manual_seed(0)
        net = Net()
        {extra}
        return net
    """
)


def _factory(tmp_path: Path, expression: str = "0.0", extra: str = "pass") -> str:
    path = tmp_path / "net.py"
    path.write_text(FACTORY.format(expression=expression, extra=extra))
    return f"{path}:make"


def _refused(run: Any, code: int, *words: str) -> None:
    """One error of at most two lines with these words, this exit code and no traceback."""
    assert run.code == code, run.err
    lines = [line for line in run.err.splitlines() if line.strip()]
    assert lines[0].startswith("error: ") and len(lines) <= 3 and "Traceback" not in run.err
    for word in words:
        assert word in run.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "timm:no_such_vit"], ["no_such_vit"]),
        (["--model", "nonsense"], ["nonsense", "timm:NAME"]),
        (["--target", "tflite"], ["unknown target 'tflite'", "openvino"]),
        (["--image-size", "90x100"], ["90x100", "nearest"]),
        (["--image-size", "big"], ["--image-size big", "HxW"]),
        (["--int8", "--calib", "nowhere"], ["nowhere"]),
        (["--eval", "nowhere"], ["nowhere"]),
        (["--int8", "--keep-float", "nope*"], ["nope*", "matches no layer"]),
        (["--int8", "--calib-method", "magic"], ["magic", "entropy"]),
        (["--mean", "1,2"], ["--mean 1,2"]),
        (["--interpolation", "cubicle"], ["cubicle", "bicubic"]),
        (["--checkpoint", "missing.safetensors"], ["missing.safetensors"]),
        (["--model", "timm:vit_tiny_patch16_224", "--int8"], ["--int8 needs calibration images"]),
    ],
)
def test_wrong_options(vit_export: Any, tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    """Each wrong option names itself and what would be right; nothing but finished stages is left."""
    run = vit_export(*arguments, "--output", tmp_path / "out")
    _refused(run, 2, *words)
    assert {path.name for path in (tmp_path / "out").glob("*")} <= {".cache"}


def test_empty_folder(vit_export: Any, tmp_path: Path) -> None:
    """A folder without images says what was looked for."""
    (tmp_path / "empty").mkdir()
    run = vit_export("--int8", "--calib", tmp_path / "empty", "--output", tmp_path / "out")
    _refused(run, 2, "no images in", ".png")


def test_one_bad_image_is_skipped_and_counted(vit_export: Any, photos: Path, tmp_path: Path) -> None:
    """A truncated image among twenty is left out and the report says so."""
    bad = photos / "class0" / "00.png"
    bad.write_bytes(bad.read_bytes()[:200])
    model = _factory(tmp_path)
    arguments = ("--model", model, "--image-size", 16, "--eval", photos, "--num-classes", 2)
    run = vit_export(*arguments[:4], "--eval", photos / "class0", "--output", tmp_path / "out", "--json")
    assert run.code == 2  # one of ten is more than 5 %
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in photos.rglob("*.png"):
        (flat / path.name).write_bytes(path.read_bytes())
    run = vit_export(*arguments[:4], "--eval", flat, "--output", tmp_path / "out")
    assert run.code == 0
    import json

    data = json.loads((tmp_path / "out/report.json").read_text())["data"]["eval"]
    assert data["images"] == 19 and data["skipped"] == 1


def test_labels_that_do_not_match(vit_export: Any, photos: Path, tmp_path: Path) -> None:
    """Two class folders for a ten-class model are refused with both counts."""
    run = vit_export("--eval", photos, "--output", tmp_path / "out")
    _refused(run, 2, "2 class folders", "10 classes")


def test_checkpoint_of_another_model(vit_export: Any, tmp_path: Path) -> None:
    """Missing and unexpected keys are listed."""
    save_file({"encoder.weight": torch.zeros(3, 3)}, tmp_path / "other.safetensors")
    run = vit_export("--checkpoint", tmp_path / "other.safetensors", "--output", tmp_path / "out")
    assert run.code == 2 and "encoder.weight" in run.err and "Traceback" not in run.err
    assert not (tmp_path / "out").exists()


def test_nan_weights_are_located(vit_export: Any, tmp_path: Path) -> None:
    """NaN in a weight stops the run with the parameter's name."""
    model = _factory(tmp_path, extra="net.body[1].weight.data[0, 0] = float('nan')")
    run = vit_export("--model", model, "--image-size", 16, "--output", tmp_path / "out")
    _refused(run, 2, "body.1.weight")


def test_nan_activations_are_located(vit_export: Any, tmp_path: Path, photos: Path) -> None:
    """A model whose activations overflow is stopped, not quantised."""
    model = _factory(tmp_path, expression="(x.flatten(1)[:, :10] * 1e38) * 1e38")
    run = vit_export(
        "--model", model, "--image-size", 16, "--eval", photos / "class0", "--output", tmp_path / "o"
    )
    _refused(run, 2, "NaN or Inf", "first in bad")


def test_float16_overflow_is_located(vit_export: Any, tmp_path: Path, photos: Path) -> None:
    """Activations beyond float16 are in the report by their module's path, before any device meets them."""
    model = _factory(tmp_path, extra="net.body[1].weight.data *= 1e6")
    options = (
        "--image-size",
        16,
        "--eval",
        photos / "class0",
        "--target",
        "openvino",
        "--fp16",
        "--no-bundle",
    )
    run = vit_export("--model", model, *options, "--output", tmp_path / "out")
    assert run.code == 0, run.err
    words = "float16 holds 65504 at most and overflows in body.1 ("
    assert words in run.out.replace("\n", " ")
    for name in ("report.md", "report.html", "report.json"):
        assert words in (tmp_path / "out" / name).read_text(), name


def test_output_that_cannot_be_written(vit_export: Any, tmp_path: Path) -> None:
    """An output below a file is refused before the model is loaded."""
    (tmp_path / "file").write_text("x")
    run = vit_export("--output", tmp_path / "file" / "out")
    _refused(run, 2, "cannot write")


def test_unsupported_operator(vit_export: Any, tmp_path: Path) -> None:
    """An operator without translation fails its row with the operator and the module path; exit 3."""
    model = _factory(tmp_path, expression="torch.linalg.eigvalsh(x.mean(1))[:, :10]")
    run = vit_export("--model", model, "--image-size", 16, "--output", tmp_path / "out")
    assert run.code == 3
    assert "eigh" in run.out and " in bad" in run.out.replace("\n", " ").replace("  ", " ")
    assert not list((tmp_path / "out").rglob("*.onnx"))


def test_labels_outside_the_classes(vit_export: Any, tmp_path: Path) -> None:
    """An .npz with labels beyond the model's classes is refused with the numbers."""
    images = np.zeros((20, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "e.npz", images=images, labels=np.full(20, 12))
    run = vit_export("--eval", tmp_path / "e.npz", "--output", tmp_path / "out")
    _refused(run, 2, "12", "10 classes")


def test_missing_extra_is_one_line(vit_export: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without OpenVINO its target answers with the pip command and exit 3."""
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "openvino" else real(name, *a)
    )
    run = vit_export("--target", "openvino", "--output", tmp_path / "out")
    _refused(run, 3, "openvino is not installed", "pip install 'vit-export[openvino]'")
    assert not (tmp_path / "out").exists()


def test_sizes_that_do_not_fit_are_one_error_before_any_work(vit_export: Any, tmp_path: Path) -> None:
    """Of three sizes two do not fit: both are named, with what fits, and the good one is not exported."""
    sizes = (f"--image-size={size}" for size in ("96", "100", "30x41"))
    run = vit_export(*sizes, "--output", tmp_path / "out")
    _refused(run, 2, "100x100, 30x41 do not fit", "multiple of 8", "nearest: 96x96, 104x104, 32x40, 24x40")
    assert not (tmp_path / "out" / "onnx").exists()


def test_models_lists_and_describes(vit_export: Any) -> None:
    """A pattern lists native sizes and position schemes; a SPEC is described by making the model."""
    run = vit_export("models", "*vit_small_patch14_dinov2*")
    assert run.code == 0 and "518x518" in run.out and "absolute table" in run.out
    run = vit_export("models", "digits-vit")
    assert run.code == 0 and "96x96" in run.out and "8x8" in run.out
    assert "--image-size: each side must be a multiple of 8 (patch 8)" in run.out
    run = vit_export("models", "no-such-thing")
    assert run.code == 2 and "no model matches" in run.err


def test_doubtful_calibration_images_are_named(vit_export: Any, tmp_path: Path) -> None:
    """Too few, one of them of one colour, one a copy, also evaluated on, wrongly normalised: all is said."""
    with np.load(DIGITS_IMAGES) as digits:
        calib, judged = digits["calib_images"][:10], digits["eval_images"][:20]
    calib[3], calib[7], judged[:2] = 255, calib[6], calib[:2]
    np.savez(tmp_path / "calib.npz", images=calib)
    np.savez(tmp_path / "eval.npz", images=judged)
    given = ("--calib", tmp_path / "calib.npz", "--eval", tmp_path / "eval.npz", "--mean", "90,90,90")
    run = vit_export("--int8", "--calib-method", "minmax", *given, "--output", tmp_path / "o", "--quiet")
    for said in (
        "note: only 10 calibration images; 16 or more give steadier ranges",
        "note: 1 of 10 calibration images are of one colour",
        "note: 1 of 10 calibration images are copies of others",
        "check --mean and --std",
        "note: 2 of 20 evaluation images are also calibration images: accuracy is flattered",
    ):
        assert said in run.out
