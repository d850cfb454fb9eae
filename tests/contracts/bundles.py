"""A small bundle whose artifact is the fake runner's: real files, real workers, no SDK and no export."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from contracts.sample_report import report, result
from vit_export.artifacts import EvalSet, Precision, Preprocessing, Runnable
from vit_export.runtime.bundle import SizeImages, write_bundle
from vit_export.runtime.report_schema import Baseline, Data, EvalData, PackedIds, Report
from vit_export.runtime.runner import open_runner

SIZE = (32, 32)
IMAGES = 40
CONTRACT = Preprocessing(SIZE)


def fake_export(output: Path, *, size: int = 7000, **options: Any) -> tuple[Report, SizeImages]:
    """What an export leaves: an artifact in `output`, its report, and the images with FP32 outputs.

    size: bytes of the artifact. options: of the fake runner that stands for it; the baseline is the fake
    without any.
    """
    artifact = output / "onnx" / "int8" / "32x32" / "model.onnx"
    artifact.parent.mkdir(parents=True)
    artifact.write_bytes(np.random.default_rng(7).bytes(size))  # as incompressible as weights are
    (output / "plan.json").write_text("{}")
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, *SIZE, 3), dtype=np.uint8)
    np.save(output.parent / "pixels.npy", pixels)
    with open_runner(Runnable("fake", Path("-"))) as runner:
        logits = runner.infer(CONTRACT.normalize(pixels))
    labels = np.argmax(logits, axis=1).astype(np.int64)
    made = result(
        image_size=SIZE, artifact="onnx/int8/32x32/model.onnx", bytes=size, images=IMAGES, sqnr_db=40.0
    )
    images = EvalSet(output.parent / "pixels.npy", CONTRACT, IMAGES, labels, tuple("x" * IMAGES))
    baseline = Baseline(
        runtime="pytorch", precision=Precision.FP32, image_size=SIZE, runtime_version="torch 2"
    )
    data = EvalData(
        path="/home/me/eval", images=IMAGES, sha256="1" * 64, labels=True, label_ids=PackedIds.pack(labels)
    )
    model = report().model
    whole = report(made, baseline=baseline, data=Data(eval=data), model=model)
    runnable = Runnable("fake", artifact, 0, options)
    return whole, SizeImages(images, logits, baseline, {made.name: runnable})


def fake_bundle(
    output: Path, *, images: int = IMAGES, labels: bool = True, zipped: bool = False, **options: Any
) -> Path:
    """`output/bundle` (or bundle.zip) around a fake artifact."""
    whole, brought = fake_export(output, **options)
    if not labels:
        brought = replace(brought, images=replace(brought.images, labels=None))
    folder = write_bundle(whole, [brought], output, images=images, zipped=zipped)
    return output / "bundle.zip" if zipped else folder
