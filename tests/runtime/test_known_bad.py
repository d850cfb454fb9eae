"""The table of versions known to be wrong, slow or unable, and who it is told to."""

from __future__ import annotations

from typing import Any

import pytest

from vit_export.artifacts import Precision
from vit_export.runtime import environment
from vit_export.runtime.known_bad import against, known_bad, problems, within
from vit_export.runtime.known_bad_table import KNOWN_BAD, KnownBad

BASE: dict[str, Any] = {"advice": "do this", "sources": ("https://where",)}


def sources(version: str, package: str = "tensorrt", **given: Any) -> tuple[str, ...]:
    """Every source of the entries that fit."""
    return tuple(s for bad in known_bad(package, version, features=(), **given) for s in bad.sources)


def test_every_entry_can_be_followed():
    """Each has a package that reports list, a symptom, advice and sources that are URLs."""
    for bad in KNOWN_BAD:
        assert bad.symptom and bad.advice
        assert bad.sources and all(source.startswith("https://") for source in bad.sources)
        assert bad.package in environment.PACKAGES


def test_problems_of_this_machine():
    """A version inside the range is told with advice and source, one outside is not; CPU and board count."""
    table = (
        KnownBad("pkg", "1.2", "1.3", "wrong", "is off", **BASE),
        KnownBad("pkg", "2", "2", "wrong", "is off", feature="amx-int8", **BASE),
        KnownBad("pkg", "3", "3", "refused", "is off", jetson=True, **BASE),
    )

    def told(version: str, **where: Any) -> tuple[str, ...]:
        return problems({"pkg": version}, features=where.pop("features", ()), table=table, **where)

    assert told("1.2.0") == ("pkg 1.2.0 (reported wrong): is off; do this (https://where)",)
    assert told("1.3.9rc1")
    assert not told("1.4.0")
    assert not told("1.1.99")
    assert not told("2.5")
    assert told("2.5", features=("amx-int8",))
    assert not told("3.0")
    assert told("3.0", jetson=True)
    assert problems({"other": "1.3"}, table=table) == ()


@pytest.mark.parametrize(
    ("version", "inside"),
    [
        ("10.16", True),
        ("10.16.1.11", True),
        ("10.17", False),
        ("10.2", False),
        ("10.3.0", True),
        ("11", False),
    ],
)
def test_versions_compare_part_by_part(version: str, inside: bool):
    """10.16 is newer than 10.3, and the last version covers everything below it."""
    assert within(version, "10.3", "10.16") is inside


@pytest.mark.parametrize(
    ("version", "found"),
    [
        ("10.3.0", True),
        ("10.3.0.30", True),
        ("10.4.0", False),
        ("10.16.1.11", False),
        ("11.4.0.106", False),
    ],
)
def test_jetpack_6_is_warned_and_jetpack_7_is_not(version: str, found: bool):
    """FP16 ViTs are wrong on 10.3 (JetPack 6), not on 10.16 (JetPack 7)."""
    hits = sources(version, models=("vit_small_patch16_dinov3",), precision=Precision.FP16)
    assert any("/4723" in source for source in hits) is found


@pytest.mark.parametrize(("version", "refused"), [("11.3.0", True), ("11.4.0.106", True), ("11.4.1", False)])
def test_jetpack_got_tensorrt_11_late(version: str, refused: bool):
    """NVIDIA supports JetPack (7.2.2) from 11.4.1 on; elsewhere than on a Jetson 11.0 is no problem."""
    assert bool(sources(version, jetson=True, kinds=("refused",))) is refused
    assert not sources(version, kinds=("refused",))


def test_precision_model_chip_and_product_narrow():
    """An entry for FP16 on consumer Blackwell is silent for FP32, for other chips and for RTX."""

    def blackwell(package: str = "tensorrt", **given: Any) -> bool:
        return any("/4837" in source for source in sources("10.16.1", package, **given))

    assert blackwell(precision=Precision.FP16, capability="12.0")
    assert not blackwell(precision=Precision.FP32, capability="12.0")
    assert not blackwell(precision=Precision.FP16, capability="8.7")
    assert not blackwell("tensorrt-rtx")
    assert blackwell()  # nothing given excludes nothing: what doctor asks


def test_batches_of_pyramids():
    """PVT's relative SegFormer is wrong above batch 1 from 10.11 to 11.1: PVT is told, ViT is not."""
    assert any("/4853" in s for s in sources("11.1.0", models=("pvt_v2_b0",)))
    assert not any("/4853" in s for s in sources("11.1.0", models=("vit_base",)))
    assert not any("/4853" in s for s in sources("11.4.0.106", models=("pvt_v2_b0",)))


def test_a_report_is_told_what_fits_its_result():
    """A result names its runtime and version; entries about speed are told only to slow results."""
    given: dict[str, Any] = {"models": ("vit", "vit_small_patch16_224"), "precision": Precision.INT8}
    (fp16, dynamic) = against("tensorrt 10.3.0", **given)
    assert "/4723" in fp16 and "--batch-size" in dynamic
    assert against("tensorrt_rtx 1.7.1.116", **given) == ()
    (slow,) = against("tensorrt_rtx 1.7.1.116", slow=True, **given)
    assert slow.startswith("tensorrt-rtx 1.7.1.116 (reported slow): ")
    assert against("coremltools 9.0, reference interpreter, not Apple's runtime", **given) == ()
