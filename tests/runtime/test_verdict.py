"""Verdicts: one table of cases, each with the words a user reads."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from contracts.sample_report import latency, result
from vit_export.artifacts import Precision
from vit_export.runtime.verdict import Limits, judge, judged

NO_LABELS: dict[str, Any] = {"top1": None, "top5": None, "top1_drop": None, "top1_drop_ci95": None}
FP16 = result(precision=Precision.FP16, latency_ms=latency(37.2), speedup=2.6)
FP32 = result(precision=Precision.FP32, latency_ms=latency(30.0), speedup=3.2)


@pytest.mark.parametrize(
    ("changes", "verdict", "reason"),
    [
        ({}, "ship", "2.4x faster, drop 0.2 points [-0.1, 0.5]"),
        ({"speedup": 1.02}, "ship", "as fast as the FP32 baseline, drop 0.2 points [-0.1, 0.5]"),
        (
            {"top1_drop": 2.1, "top1_drop_ci95": (1.2, 3.0)},
            "hold",
            "top-1 drop 2.1 points is over the limit 1.0",
        ),
        (
            {"top1_drop": 2.1, "top1_drop_ci95": (-0.1, 4.3)},
            "hold",
            "top-1 drop 2.1 points is over the limit 1.0 (not settled by 400 images: about 1600 would)",
        ),
        (
            {"top1_drop": 0.2, "top1_drop_ci95": (-1.4, 1.8)},
            "ship",
            "2.4x faster, drop 0.2 points [-1.4, 1.8] (not settled by 400 images: about 1600 would)",
        ),
        (
            {"top1_drop": -0.04, "top1_drop_ci95": (-0.3, 0.2)},
            "ship",
            "2.4x faster, drop 0.0 points [-0.3, 0.2]",
        ),
        ({"speedup": 0.9}, "hold", "int8 is 0.90x the speed of the FP32 baseline here"),
        (
            {"speedup": 0.9, "top1_drop": 3.0, "top1_drop_ci95": (2.0, 4.0)},
            "hold",
            "top-1 drop 3.0 points is over the limit 1.0; int8 is 0.90x the speed of the FP32 baseline here",
        ),
        (
            {"speedup": 0.9, "latency_ms": latency(40, unstable=True)},
            "hold",
            "int8 is 0.90x the speed of the FP32 baseline here (unstable timing)",
        ),
        (
            {"latency_ms": latency(40, unstable=True)},
            "ship",
            "2.4x faster, unstable timing, drop 0.2 points [-0.1, 0.5]",
        ),
        (
            {"latency_ms": None, "speedup": None},
            "ship",
            "speed not measured here, drop 0.2 points [-0.1, 0.5]",
        ),
        (
            {"latency_ms": None, "speedup": None, "reason": "only a Mac can time it"},
            "ship",
            "only a Mac can time it, drop 0.2 points [-0.1, 0.5]",
        ),
        (NO_LABELS, "ship", "2.4x faster, 98.5% of images get FP32's class (no labels)"),
        (
            NO_LABELS | {"agreement": 0.5},
            "hold",
            "only 50.0% of images get FP32's class, the limit is 95.0% (no labels)",
        ),
        (NO_LABELS | {"agreement": None, "cosine": None}, "hold", "accuracy was not measured"),
        ({"status": "failed", "reason": "the worker died"}, "hold", "failed: the worker died"),
        ({"status": "not_run", "reason": "needs a GPU"}, None, "not run here: needs a GPU"),
    ],
)
def test_verdict_in_words(changes: dict[str, Any], verdict: str | None, reason: str):
    """Each situation gives its verdict and the sentence for it."""
    found = judge(result(**changes))
    assert (found.verdict, found.reason) == (verdict, reason)


@pytest.mark.parametrize(
    ("peers", "reason"),
    [
        ((FP16,), "int8 is 0.93x the speed of fp16 here"),
        ((FP16, FP32), "int8 is 0.75x the speed of fp32 here"),
    ],
)
def test_int8_must_beat_what_the_target_offers(peers, reason: str):
    """int8 slower than fp16 or fp32 of the same target and size is held, the worst ratio is named."""
    found = judge(result(), peers=(result(), *peers))
    assert (found.verdict, found.reason) == ("hold", reason)


def test_only_same_target_and_size_are_rivals():
    """Another target, another size, a lower precision and an untimed peer do not count."""
    others = (
        result(target="openvino", precision=Precision.FP16, latency_ms=latency(1)),
        result(precision=Precision.FP16, image_size=(112, 112), latency_ms=latency(1)),
        result(precision=Precision.FP16, latency_ms=None),
    )
    assert judge(result(), peers=others).verdict == "ship"
    assert judge(FP16, peers=(result(latency_ms=latency(1)),)).verdict == "ship"


def test_a_draw_is_not_slower():
    """Two percent is noise of the machine, not a reason to hold."""
    peer = result(precision=Precision.FP32, latency_ms=latency(39.3))
    assert judge(result(), peers=(peer,)).verdict == "ship"


@pytest.mark.parametrize(
    ("details", "reason"),
    [
        ({}, "int8 is no faster than fp16 here (1.01x)"),
        (
            {"int8_fallbacks": ["a", "b", "c", "d", "e"]},
            "int8 is no faster than fp16 here (1.01x; not int8 in the engine: a, b, c, d and 1 more)",
        ),
        (
            {"int8_fallbacks": []},
            "int8 is no faster than fp16 here (1.01x; every quantised layer is int8 in the engine)",
        ),
    ],
)
def test_int8_must_win_against_fp16(details: dict[str, Any], reason: str):
    """A draw with fp16 is no reason to ship int8, and the layers the engine did not take are named."""
    peer = result(precision=Precision.FP16, latency_ms=latency(40.4))
    found = judge(result(details=details), peers=(peer,))
    assert (found.verdict, found.reason) == ("hold", reason)
    slower = result(precision=Precision.FP16, latency_ms=latency(20))
    assert judge(result(details=details), peers=(slower,)).reason.startswith(
        "int8 is 0.50x the speed of fp16"
    )


def test_known_faults_are_told_with_the_result():
    """What is reported against the runtime and chip of a result is a note of it; the verdict stays."""
    device = {"device": {"capability": [8, 7]}}
    bad = result(target="tensorrt", runtime_version="tensorrt 10.3.0", details=device)
    (told,) = judged([bad], family="vision_transformer", spec="timm:vit_tiny_patch16_224")
    assert told.verdict == "ship"
    assert [note.startswith("tensorrt 10.3.0 (reported wrong): ") for note in told.notes] == [True, True]
    (slow,) = judged([msgspec.structs.replace(bad, speedup_vs_fp16=0.9)], family="", spec="x")
    assert any("int8 ViTs no faster than FP16" in note for note in slow.notes)
    (fine,) = judged([result()], family="vision_transformer", spec="timm:vit_tiny_patch16_224")
    assert fine.notes == ()


def test_limit_is_applied_to_the_drop_and_recorded():
    """--max-drop moves the line, and the gate carries value, limit and outcome."""
    strict = judge(result(top1_drop=0.2), limits=Limits(max_drop=0.1))
    assert strict.verdict == "hold"
    assert [(g.rule, g.value, g.limit, g.passed) for g in strict.gates] == [("max_drop", 0.2, 0.1, False)]
    (gate,) = judge(result(top1_drop=0.2), limits=Limits(max_drop=0.2)).gates
    assert gate.passed is True


def test_embeddings_are_judged_by_cosine():
    """Without a classifier head and without labels the cosine decides."""
    found = judge(result(**{**NO_LABELS, "agreement": 0.7, "cosine": 0.999}), embeddings=True)
    assert (found.verdict, found.reason) == ("ship", "2.4x faster, cosine 0.9990 to FP32 (no labels)")
    found = judge(result(**{**NO_LABELS, "agreement": 0.7, "cosine": 0.9}), embeddings=True)
    assert (found.verdict, found.reason) == ("hold", "cosine 0.9000 to FP32 is under the limit 0.98")
