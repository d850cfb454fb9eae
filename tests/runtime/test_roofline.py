"""Products a second beside what the processor reaches."""

from __future__ import annotations

import pytest

from contracts.sample_report import SIZE, latency, report, result
from vit_export.artifacts import Precision
from vit_export.runtime import ceilings, roofline
from vit_export.runtime.report_schema import Ceilings, Report
from vit_export.runtime.report_sections import sections

MACS = {SIZE: 6_000_000_000}
TOPS = Ceilings(runtime="openvino 2026.4.1", threads=2, fp32=100.0, bf16=200.0, int8=400.0)


@pytest.fixture
def tops(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with known ceilings."""
    monkeypatch.setattr(roofline, "measure_ceilings", lambda threads: TOPS)


def reached(made: Report) -> list[tuple[float, str, float | None] | None]:
    """(GMAC/s, ceiling, share) of each result."""
    found = [one.roofline for one in made.results]
    return [f and (f.gmac_per_s, f.ceiling, f.share) for f in found]


def test_share_is_of_the_arithmetic_that_the_artifact_computes_in(tops: None) -> None:
    """6 GMAC in 40 ms are 150 GMAC/s: 3/8 of int8's 400; fp32 in bfloat16 is a share of bf16's ceiling."""
    made = report(
        result(latency_ms=latency(40.0)),
        result(precision=Precision.FP32, latency_ms=latency(100.0)),
        result(target="openvino", precision=Precision.FP32, latency_ms=latency(60.0),
               details={"inference_precision": "bf16"}),
    )  # fmt: skip
    found = roofline.with_roofline(made, MACS)
    assert reached(found) == [(150.0, "int8", 0.375), (60.0, "fp32", 0.6), (100.0, "bf16", 0.5)]
    assert found.baseline.roofline is not None and found.baseline.roofline.ceiling == "fp32"
    assert reached(roofline.with_roofline(made, MACS, batch=8))[0] == (1200.0, "int8", 3.0)


def test_a_device_or_a_size_without_macs_has_no_share(tops: None) -> None:
    """TensorRT does not run on this processor, and what is not known is not guessed."""
    made = report(result(), result(target="tensorrt"))
    assert reached(roofline.with_roofline(made, MACS))[1] is None
    other = {(32, 32): 10}
    assert reached(roofline.with_roofline(made, other)) == [None, None]


def test_nothing_is_measured_where_nothing_was_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report without a time on this processor comes back as it is."""
    monkeypatch.setattr(roofline, "measure_ceilings", lambda threads: pytest.fail("measured"))
    made = report(result(target="tensorrt"), result(latency_ms=None))
    assert roofline.with_roofline(made, MACS) is made


@pytest.mark.parametrize("runtime", ceilings.PROBES)
def test_probes_multiply_in_each_arithmetic(runtime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each runtime that can tell gives a positive speed for fp32 and int8 (small matrices here)."""
    pytest.importorskip(runtime)
    monkeypatch.setattr(ceilings, "SIDE", 64)
    monkeypatch.setattr(ceilings, "SECONDS", 0.0)
    monkeypatch.setattr(ceilings, "PROBES", {runtime: ceilings.PROBES[runtime]})
    found = ceilings.measure(1)
    assert found.pop("runtime").startswith(runtime)
    assert {"fp32", "int8"} <= found.keys() and all(value >= 0 for value in found.values())


def test_a_machine_without_a_probe_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """With ONNX Runtime alone there is no ceiling, and the report names what it would take."""
    monkeypatch.setattr(ceilings, "PROBES", {"no_such_runtime": ceilings.openvino_products})
    assert ceilings.measure(1) == {}
    monkeypatch.setattr(roofline, "measure_ceilings", lambda threads: None)
    found = roofline.with_roofline(report(result()), MACS)
    assert "OpenVINO or PyTorch" in next(iter(sections(found))).caption
    assert reached(found)[0] == (150.0, "int8", None)


def test_sections_show_what_there_is(tops: None) -> None:
    """The share is printed in per cent beside its ceiling; a report without measurements has no section."""
    assert list(sections(report(result()))) == []
    (section,) = sections(roofline.with_roofline(report(result()), MACS))
    assert section.rows[-1] == ("onnx int8", "150", "38%", "int8")
    assert "int8 400" in section.caption and "2 threads" in section.caption
