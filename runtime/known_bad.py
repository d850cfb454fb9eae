"""Versions that give wrong numbers or cannot run what we export: data, with where it was reported.

These are reports, not our measurements; each names its source. TensorRT has a table of its own, because
there model, GPU and precision count too: trt_known_bad.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vit_export.runtime.environment import cpu_features

_END = "999"


@dataclass(frozen=True, slots=True)
class KnownBad:
    """low <= version < high is affected. feature: only on CPUs that have it; jetson: only on a Jetson."""

    package: str
    low: str
    high: str
    what: str
    source: str
    feature: str = ""
    jetson: bool = False


KNOWN_BAD: tuple[KnownBad, ...] = (
    KnownBad("tensorrt", "11", _END, "no support for JetPack", "TensorRT 11 release notes", jetson=True),
    KnownBad("onnxruntime", "0", "1.23", "no Attention (opset 23)", "microsoft/onnxruntime#25156"),
    KnownBad(
        "onnxruntime", "1.23", "1.24", "wrong int8 convolutions with AMX",
        "microsoft/onnxruntime#26324", feature="amx-int8",
    ),
    KnownBad("openvino", "2025.3", "2026", "less accurate DINOv2 detector", "roboflow/rf-detr#515"),
)  # fmt: skip


def problems(
    versions: Mapping[str, str],
    *,
    jetson: bool = False,
    features: Sequence[str] | None = None,
    known: Sequence[KnownBad] = KNOWN_BAD,
) -> tuple[str, ...]:
    """What is known against these versions on this machine: `tensorrt 10.3.0: ... (source)`.

    versions: distribution → version. features: of the CPU, read from the system without it.
    """
    have = cpu_features() if features is None else features
    return tuple(
        f"{bad.package} {versions[bad.package]}: {bad.what} ({bad.source})"
        for bad in known
        if bad.package in versions
        and release(bad.low) <= release(versions[bad.package]) < release(bad.high)
        and (not bad.feature or bad.feature in have)
        and (jetson or not bad.jetson)
    )


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version without its trailing zeros and suffix: `1.23.0rc1` is (1, 23)."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    numbers = [int(part) for part in match[0].split(".")] if match else [0]
    while len(numbers) > 1 and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
