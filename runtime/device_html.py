"""The device that `verify` ran on: board, clocks, heat, power and throttling, before and after."""

from __future__ import annotations

from collections.abc import Iterator

from vit_export.runtime.html_tree import Node, items, table
from vit_export.runtime.report_schema import Device

_NONE = "-"


def parts(device: Device) -> Iterator[Node | None]:
    """What it is, what was not readable or slowed down, and every sensor."""
    yield items(_facts(device))
    yield table(
        "Readings before and after measuring", ("sensor", "before", "after", "limit"), _readings(device)
    )


def _facts(device: Device) -> Iterator[str]:
    state = device.before
    yield device.host and f"host: {device.host}"
    yield state.board and f"board: {state.board}"
    yield state.power_mode and f"power mode: {state.power_mode}"
    yield state.governor and f"clock governor: {state.governor}"
    yield f"bundle: SHA-256 {device.bundle_sha256}"
    if device.throttled:
        yield f"slowed while measuring, so times are too long: {', '.join(device.throttled)}"
    elif state.throttled:
        yield f"a clock was limited before measuring began: {', '.join(state.throttled)}"
    if state.unreadable:
        yield f"not readable here: {', '.join(state.unreadable)}"


def _readings(device: Device) -> Iterator[tuple[str, ...]]:
    before, after = device.before, device.after
    for unit, first, last, limit in (
        ("MHz", before.mhz, after.mhz, before.max_mhz),
        ("°C", before.celsius, after.celsius, {}),
        ("mW", before.milliwatts, after.milliwatts, {}),
        ("events", before.throttle_events, after.throttle_events, {}),
    ):
        for name in {**first, **last}:
            yield name, *(_value(values.get(name), unit) for values in (first, last, limit))


def _value(value: float | None, unit: str) -> str:
    return _NONE if value is None else f"{value:g} {unit}"
