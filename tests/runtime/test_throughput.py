"""Images a second: what is counted, over which batches, threads and streams."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from contracts.sample_report import report, result
from contracts.tiny import SIZE, Tiny
from vit_export.artifacts import EvalSet, Preprocessing, Runnable
from vit_export.runtime import throughput
from vit_export.runtime.report_schema import ThroughputPoint
from vit_export.runtime.report_sections import sections
from vit_export.runtime.runner import open_runner


@pytest.fixture
def images(tmp_path: Path) -> EvalSet:
    """Four images of the tiny model's size."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, *SIZE, 3), dtype=np.uint8)
    np.save(tmp_path / "pixels.npy", pixels)
    return EvalSet(tmp_path / "pixels.npy", Preprocessing(SIZE), 4)


def test_a_known_delay_gives_a_known_rate() -> None:
    """Calls of 5 ms with 8 images are 1,600 images a second at most."""
    options = {"image_size": (16, 16), "delay_ms": 5.0}
    with open_runner(Runnable("fake", Path("-"), 1, options)) as runner:
        calls, seconds = runner.rate(np.zeros((8, 3, 16, 16), np.float32), seconds=0.2)
    assert calls >= 2 and 0.004 * calls < seconds < 2.0
    assert 8 * calls / seconds <= 1600


@pytest.mark.parametrize(("runner", "suffix"), [("onnx", "onnx"), ("openvino", "xml")])
def test_curves_cover_threads_and_calls_at_once(
    runner: str, suffix: str, tiny: Tiny, images: EvalSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One call at a time on 1 and 2 threads, then calls at once on both; each over the batches."""
    pytest.importorskip({"onnx": "onnxruntime"}.get(runner, runner))
    runnable = Runnable(runner, tiny.path(suffix), threads=2)
    points = list(throughput.curve(runnable, images, batches=(1, 3), seconds=0.05))
    ways = [(p.mode, p.threads, p.batch) for p in points]
    assert ways == [
        ("latency", 1, 1), ("latency", 1, 3), ("latency", 2, 1), ("latency", 2, 3),
        ("throughput", 2, 1), ("throughput", 2, 3),
    ]  # fmt: skip
    assert all(p.images_per_s > 0 and (p.streams == 1 or p.mode == "throughput") for p in points)
    if runner == "onnx":
        assert points[-1].streams == 2


def test_a_fixed_batch_has_one_point_a_way(tiny: Tiny, images: EvalSet) -> None:
    """An artifact built for batch 2 is measured at batch 2 only."""
    pytest.importorskip("onnxruntime")
    runnable = Runnable("onnx", tiny.path("onnx", batch=2), threads=1)
    assert [p.batch for p in throughput.curve(runnable, images, seconds=0.01)] == [2]


def test_what_did_not_run_here_has_no_curve(images: EvalSet) -> None:
    """A result without a latency, or of a device, comes back as it is."""
    silent = lambda *step: pytest.fail("measured")  # noqa: E731
    for one in (result(latency_ms=None), result(target="coreml")):
        runner = one.target
        assert throughput.measured(one, Runnable(runner, Path("x")), images, silent) is one


def test_a_failure_is_a_note(images: EvalSet) -> None:
    """A file that cannot be opened costs the curve, not the result."""
    found = throughput.measured(result(), Runnable("onnx", Path("none.onnx"), 1), images, lambda *s: None)
    assert not found.throughput and "throughput was not measured" in found.notes[-1]


def test_a_row_a_way_and_a_column_a_batch() -> None:
    """The section puts the batches of one way of calling side by side."""
    points = tuple(
        ThroughputPoint(mode=mode, threads=2, streams=streams, batch=batch, images_per_s=10.0 * batch)
        for mode, streams in (("latency", 1), ("throughput", 2))
        for batch in (1, 4)
    )
    (section,) = sections(report(result(throughput=points)))
    assert section.headers == ("artifact", "calls", "threads", "1", "4")
    assert section.rows == (
        ("onnx int8", "one by one", "2", "10.0", "40.0"),
        ("onnx int8", "2 at once", "2", "10.0", "40.0"),
    )
