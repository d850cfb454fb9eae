"""sweep.toml: which cells there are, under which names, and what is refused."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest

from vit_export.artifacts import Precision
from vit_export.errors import InputError
from vit_export.job import ExportJob
from vit_export.runtime.sweep_schema import SweepCell, with_pareto
from vit_export.sweep import matrix
from vit_export.sweep.flow import Flow
from vit_export.sweep.matrix import Cell

FILE = """
    [options]
    seed = 3
    calib-method = "minmax"
    [matrix]
    model = ["digits-vit", { model = "timm:vit_tiny_patch16_224", checkpoint = "x.safetensors" }]
    image-size = [96, "128x96"]
    target = ["onnx", "openvino"]
    precision = ["fp32", "int8"]
    [[exclude]]
    target = "openvino"
    precision = "fp32"
    [[include]]
    model = "digits-vit"
    target = "coreml"
    precision = "fp16"
"""


@pytest.fixture
def sweep(vit_export: Any, tmp_path: Path) -> Any:
    """`vit-export sweep FILE ...` on the given text."""

    def run(text: str, *arguments: object) -> Any:
        (tmp_path / "sweep.toml").write_text(textwrap.dedent(text))
        return vit_export("sweep", tmp_path / "sweep.toml", *arguments)

    return run


def test_dry_run_lists_cells_and_tasks(sweep: Any, tmp_path: Path) -> None:
    """The matrix less what is excluded plus what is included; stages that cells share are counted once."""
    text = FILE.replace('"digits-vit", {', "{").replace(', checkpoint = "x.safetensors"', "")
    text = text.replace("timm:vit_tiny_patch16_224", "digits-vit")
    run = sweep(text, "--dry-run", "--output", tmp_path / "out")
    assert run.code == 0, run.err
    assert "7 cells" in run.out and "digits-vit / coreml fp16 native" in run.out
    assert "openvino fp32" not in run.out
    lines = [line.split() for line in run.out.splitlines()]
    counts = {words[0]: int(words[1]) for words in lines if len(words) == 3 and words[1].isdigit()}
    # three sizes (native is one of its own), each traced once; int8 at two of them
    assert counts == {"prepare": 3, "evaluate": 3 + 7, "calibrate": 2, "build": 7, "row": 7, "latency": 5}
    judged = sweep(text.replace("minmax", "auto"), "--dry-run", "--output", tmp_path / "out")
    assert "calibrate 4" in " ".join(judged.out.split())  # candidates are judged under each target's profile
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "neither a [matrix] nor an [[include]]"),
        ("[matrix]\nmodel = []", "the axis model has no value"),
        ("[matrix]\ntarget = ['tflite']", "unknown target 'tflite'"),
        ("[matrix]\nprecision = ['int4']", "unknown precision 'int4'"),
        ("[matrix]\ncolour = ['red']", "a sweep has no option colour"),
        ("[matrix]\noutput = ['x']", "a sweep has no option output"),
        ("[matrix]\ntarget = ['onnx']\n[[exclude]]\ntarget = 'onnx'", "the sweep has no cell"),
        ("part = 100\n[matrix]\ntarget = ['onnx']", "a multiple of 32"),
        ("[matrix]\ntarget = ['all']", "a cell is one size, target and precision"),
        ("[matrix\n", "is not TOML"),
        (
            "[matrix]\nseed = " + str(list(range(400))) + "\nthreads = " + str(list(range(400))),
            "160000 cells",
        ),
    ],
)
def test_what_is_wrong_is_named(sweep: Any, text: str, words: str) -> None:
    """Every mistake in the file is one line with its place, exit 2."""
    run = sweep(text, "--dry-run")
    assert run.code == 2 and words in run.err and "Traceback" not in run.err


def test_a_missing_file_and_a_bad_scheduler(vit_export: Any, sweep: Any, tmp_path: Path) -> None:
    """No file, and an address that is none, are the user's mistakes."""
    assert vit_export("sweep", tmp_path / "none.toml").code == 2
    run = sweep("[matrix]\ntarget = ['onnx']", "--scheduler", "host:8786", "--output", tmp_path / "o")
    assert run.code == 2 and "tcp://host:8786" in run.err
    run = sweep("[matrix]\ntarget = ['onnx']", "--tls-cert", tmp_path / "c", "--output", tmp_path / "o")
    assert run.code == 2 and "TLS needs" in run.err


def _cell(**changes: Any) -> Cell:
    job = ExportJob(image_sizes=((96, 96),), eval_size=40, **changes)
    return Cell("g", {}, matrix.only_what_matters(job))


def test_only_int8_cells_depend_on_calibration() -> None:
    """Another calibration option makes int8 cells calibrate, build and judge again, and no float cell."""

    def keys(calib_size: int) -> dict[str, set[str]]:
        flow = Flow("store")
        for precision in (Precision.FP32, Precision.INT8):
            flow.cell(_cell(precisions=(precision,), calib_size=calib_size))
        stages: dict[str, set[str]] = {}
        for node in flow.nodes.values():
            stages.setdefault(node.stage, set()).add(node.key)
        return stages

    first, second = keys(16), keys(17)
    assert {stage: len(nodes) for stage, nodes in first.items()} == {
        "prepare": 1, "evaluate": 3, "calibrate": 1, "build": 2, "row": 2,
    }  # fmt: skip
    assert first["prepare"] == second["prepare"] and not first["calibrate"] & second["calibrate"]
    assert len(first["build"] & second["build"]) == len(first["row"] & second["row"]) == 1
    assert len(first["evaluate"] & second["evaluate"]) == 2


def test_a_resource_that_nobody_has_is_named() -> None:
    """A cell no worker can build says which resource is missing; one no worker can run is still built."""
    able = {"pytorch": 1, "build-onnx": 1, "build-tensorrt": 1, "onnx": 1}
    flow = Flow("store", able)
    assert flow.cell(_cell(targets=("openvino",))).missing == "build-openvino"
    engine = flow.cell(_cell(targets=("tensorrt",)))
    assert engine.missing == "" and engine.row.before[3] == ()
    routed = Flow("store", {**able, "tensorrt-10.3": 1}, route={"tensorrt": "tensorrt-10.3"})
    (answer,) = routed.cell(_cell(targets=("tensorrt",))).row.before[3]  # type: ignore[misc]
    assert answer.needs == ("tensorrt-10.3",)


def test_pareto_front_by_device_and_images() -> None:
    """Dominated cells are off the front; other devices, other images and unmeasured cells do not compete."""

    def cell(accuracy: float | None, ms: float, size: int, **more: Any) -> SweepCell:
        facts = {"device": "cpu", "images": "a", "status": "ok", **more}
        return SweepCell(
            group="g",
            target="onnx",
            precision=Precision.FP32,
            accuracy=accuracy,
            p50_ms=ms,
            bytes=size,
            **facts,
        )

    cells = [
        cell(0.9, 2.0, 10), cell(0.8, 1.0, 10), cell(0.8, 1.5, 10), cell(0.8, 1.0, 9), cell(0.1, 9.0, 1),
        cell(0.5, 5.0, 50, device="gpu"), cell(0.5, 5.0, 50, images="b"), cell(None, 0.1, 1),
        cell(1.0, 0.1, 1, status="failed"), cell(0.9, 2.0, 10),
    ]  # fmt: skip
    front = [c.pareto for c in with_pareto(cells)]
    assert front == [True, False, False, True, True, True, True, False, False, True]


def test_a_file_that_is_no_toml_is_bounded(tmp_path: Path) -> None:
    """A huge file is refused before it is parsed."""
    path = tmp_path / "sweep.toml"
    path.write_bytes(b"#" * (matrix.MAX_BYTES + 1))
    with pytest.raises(InputError, match="too large"):
        matrix.read(path)
