"""What the report says of a TensorRT build, in sentences; all from the artifact's details."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_NAMED = 3  # nodes named in a sentence; `kept_float32` in report.json has them all


def sentences(details: Mapping[str, Any]) -> tuple[str, ...]:
    """Engine, float32 islands, attention and command lines of one build."""
    return (*_engine(details), *_types(details), *_commands(details))


def _engine(details: Mapping[str, Any]) -> Iterator[str]:
    if details["not_built"]:
        yield f"no engine yet: {details['not_built']}"
        return
    chips, missing = details["compute_capabilities"], details["unavailable_capabilities"]
    where = f" for compute capability {', '.join(chips)}" if chips else ""
    others = f"; for {', '.join(missing)} build on the device, with TensorRT" if missing else ""
    yield f"engine built by {details['builder']} in {details['build_seconds']:g} s{where}{others}"
    for warning in details["warnings"]:
        yield f"the builder warned: {warning}"


def _types(details: Mapping[str, Any]) -> Iterator[str]:
    if "kept_float32" not in details:
        return
    kept: Mapping[str, str] = details["kept_float32"]
    judged = f"ranges of {details['ranges_from']}" if details["ranges_from"] else "no images to judge by"
    if kept:
        named = ", ".join(f"{name}: {reason}" for name, reason in list(kept.items())[:_NAMED])
        more = f", and {len(kept) - _NAMED} more" if len(kept) > _NAMED else ""
        yield f"{len(kept)} nodes stay float32 ({judged}): {named}{more}"
    else:
        yield f"float16 overflows nowhere ({judged})"
    if "int8_attention" in details:
        yield f"attention: {details['int8_attention']}"


def _commands(details: Mapping[str, Any]) -> Iterator[str]:
    for version, line in details["commands"].items():
        yield f"the same with {version}, in the artifact's folder: {line}"
