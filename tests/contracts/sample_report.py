"""A report with every kind of row, for tests of what reads, prints or judges reports."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec
import numpy as np

from vit_export.artifacts import Latency, Precision, Preprocessing
from vit_export.runtime.report_schema import (
    Baseline,
    Data,
    Environment,
    EvalData,
    ImageData,
    ModelInfo,
    PackedIds,
    Report,
    Result,
)
from vit_export.runtime.verdict import judge

IMAGES = 400
SIZE = (224, 224)


def latency(p50: float, *, unstable: bool = False) -> Latency:
    """A latency around `p50` ms."""
    return Latency(p50, p50 * (1.8 if unstable else 1.1), p50 * 2, p50 * 1.05, p50 * 0.9, 100, unstable)


def result(**changes: Any) -> Result:
    """An int8 artifact that is fine, with `changes`."""
    labels = np.arange(IMAGES) % 10
    fields: dict[str, Any] = {
        "target": "onnx",
        "precision": Precision.INT8,
        "image_size": SIZE,
        "status": "ok",
        "artifact": "onnx/int8/224x224/model.onnx",
        "bytes": 21_900_000,
        "runtime_version": "onnxruntime 1.32.0",
        "latency_ms": latency(40.0),
        "speedup": 2.4,
        "top1": 0.97,
        "top5": 1.0,
        "top1_drop": 0.2,
        "top1_drop_ci95": (-0.1, 0.5),
        "agreement": 0.985,
        "sqnr_db": 24.1,
        "cosine": 0.9981,
        "kl": 0.003,
        "images": IMAGES,
        "predictions": PackedIds.pack(labels),
    }
    return Result(**(fields | changes))


def report(*results: Result, **changes: Any) -> Report:
    """A report of `results`; of one row of each kind if none are given."""
    results = results or _every_kind()
    judged = []
    for one in results:
        verdict = judge(one, peers=results)
        judged.append(
            msgspec.structs.replace(
                one, verdict=verdict.verdict, verdict_reason=verdict.reason, gates=verdict.gates
            )
        )
    preprocessing = Preprocessing(SIZE)
    fields: dict[str, Any] = {
        "created": datetime(2026, 9, 1, 12, 0, tzinfo=UTC),
        "command": "vit-export --target onnx --int8",
        "environment": Environment(
            os="Linux-6.1", machine="x86_64", python="3.11.7", cpu="A CPU", cores=2, threads=2,
            cpu_features=("avx2", "vnni"), memory_bytes=24 << 30, versions={"vit-export": "0.1.0"},
        ),
        "model": ModelInfo(
            spec="timm:vit_small_patch14_dinov2", family="vit", parameters=22_000_000, num_classes=10,
            source_image_size=(518, 518), preprocessing=preprocessing,
            preprocessing_sha256=preprocessing.digest(), macs=6_100_000_000,
        ),
        "data": Data(
            calib=ImageData(path="calib/", images=64, sha256="0" * 64, skipped=1),
            eval=EvalData(
                path="eval/", images=IMAGES, sha256="1" * 64, labels=True,
                label_ids=PackedIds.pack(np.arange(IMAGES) % 10),
            ),
        ),
        "baseline": Baseline(
            runtime="pytorch", precision=Precision.FP32, image_size=SIZE, top1=0.972, top5=1.0,
            latency_ms=latency(95.0),
        ),
        "results": tuple(judged),
    }  # fmt: skip
    return Report(**(fields | changes))


def _every_kind() -> tuple[Result, ...]:
    unmeasured: dict[str, Any] = dict.fromkeys(
        ("artifact", "bytes", "runtime_version", "latency_ms", "speedup", "top1", "top5", "top1_drop",
         "top1_drop_ci95", "agreement", "sqnr_db", "cosine", "kl", "predictions")
    )  # fmt: skip
    return (
        result(precision=Precision.FP32, sqnr_db=None, agreement=1.0, latency_ms=latency(88.0), speedup=1.08),
        result(precision=Precision.FP16, latency_ms=latency(37.0), speedup=2.57, bytes=44_000_000),
        result(),
        result(target="openvino", top1_drop=12.5, top1_drop_ci95=(-2.25, 27.25), top1=0.847, speedup=12.345),
        result(target="tensorrt", status="not_run", reason="needs an NVIDIA GPU and driver", **unmeasured),
        result(
            target="coreml", status="failed", reason="<b>died</b> | with \x1b[31mSIGSEGV\x1b[0m", **unmeasured
        ),
    )
