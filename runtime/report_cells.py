"""The report's table as text, shared by the terminal, Markdown and HTML: baseline first, then artifacts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from vit_export.artifacts import Latency
from vit_export.runtime.report_schema import Baseline, Device, EvalData, Report, Result

HEADERS = ("artifact", "MB", "p50 ms", "p99 ms", "speed", "top-1", "drop", "agree", "SQNR", "verdict")
NONE = "-"

# Terminal escape sequences, then what neither a terminal nor XML 1.0 should be given. Vendors log both.
_UNPRINTABLE = re.compile(
    "\x1b\\[[0-9;?]*[ -/]*[@-~]|[^\t\n\u0020-\u007e\u00a0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"
)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. cells: as many as HEADERS. status: a verdict, or why there is none."""

    cells: tuple[str, ...]
    status: str


def rows(report: Report) -> Iterator[Row]:
    """Each baseline followed by the results of its image size, then results without a baseline."""
    baselines = (report.baseline, *report.more_baselines)
    for baseline in baselines:
        yield _baseline_row(baseline)
        yield from (_result_row(r) for r in report.results if r.image_size == baseline.image_size)
    sizes = {baseline.image_size for baseline in baselines}
    yield from (_result_row(r) for r in report.results if r.image_size not in sizes)


def status(result: Result) -> str:
    """`ship` or `hold` for what ran, else `failed` or `not run`."""
    return result.verdict or "-" if result.status == "ok" else result.status.replace("_", " ")


def why(result: Result) -> str:
    """The reason for `status`, in words, safe to print."""
    return printable(result.verdict_reason if result.status == "ok" else result.reason)


def untimed(report: Report) -> Iterator[tuple[str, str]]:
    """(baseline, why it has no latency) for those whose runtime failed while it was timed, safe to print."""
    for baseline in (report.baseline, *report.more_baselines):
        if baseline.reason:
            words = f"its latency and speed-ups against it are unknown: {baseline.reason}"
            yield baseline.name, printable(words)


def printable(text: str) -> str:
    """Text from elsewhere without terminal escapes and control characters."""
    return _UNPRINTABLE.sub("", text)


def join(*facts: str) -> str:
    """Facts in one line, empty ones left out."""
    return ", ".join(fact for fact in facts if fact)


def image_facts(report: Report) -> Iterator[str]:
    """Lines about the images: how many of which, and how each becomes the network's input."""
    for name, data in (("calibration", report.data.calib), ("evaluation", report.data.eval)):
        if data is not None:
            labels = "labelled" if isinstance(data, EvalData) and data.labels else ""
            skipped = f"{data.skipped} unreadable" if data.skipped else ""
            yield f"{name}: {join(f'{data.images} images', labels, skipped, data.path)}"
    contract = report.model.preprocessing
    yield (
        f"preprocessing: {contract.interpolation} to {shown_size(contract.size)}, "
        f"{contract.crop_mode} crop {contract.crop_pct:g}, mean {contract.mean}, std {contract.std}"
    )


def device_facts(device: Device) -> Iterator[str]:
    """Lines about a device: its name, clocks, heat and power before → after, what slowed it or is hidden."""
    state, after = device.before, device.after
    yield ", ".join(
        filter(None, (device.host or "this machine", state.board, state.power_mode, state.governor))
    )
    for unit, first, last in (
        ("MHz", state.mhz, after.mhz),
        ("°C", state.celsius, after.celsius),
        ("mW", state.milliwatts, after.milliwatts),
    ):
        if moved := [f"{k} {v:.0f} → {last[k]:.0f} {unit}" for k, v in first.items() if k in last]:
            yield ", ".join(moved)
    if state.unreadable:
        yield f"not readable here: {', '.join(state.unreadable)}"
    if device.throttled:
        yield f"slowed while measuring: {', '.join(device.throttled)}"


def megabytes(size: int | None) -> str:
    """Bytes as MB (10^6) with about three significant digits."""
    if size is None:
        return NONE
    return _three(size / 1e6)


def milliseconds(value: float | None) -> str:
    """Milliseconds with about three significant digits."""
    return NONE if value is None else _three(value)


def number(value: float | None, form: str) -> str:
    """`value` in the given format, a dash if it was not measured; never a negative zero."""
    if value is None:
        return NONE
    text = format(value, form)
    return text.removeprefix("-") if not any(digit in text for digit in "123456789") else text


def shown_size(size: tuple[int, int]) -> str:
    """`(224, 288)` as users type it: `224x288`."""
    return f"{size[0]}x{size[1]}"


def _baseline_row(baseline: Baseline) -> Row:
    speed = "1.00x" if baseline.latency_ms else NONE
    cells = (baseline.name, NONE, *_times(baseline.latency_ms), speed, number(baseline.top1, ".3f"))
    return Row((*cells, *[NONE] * 3, "baseline"), "baseline")


def _result_row(result: Result) -> Row:
    cells = (
        result.name,
        megabytes(result.bytes),
        *_times(result.latency_ms),
        NONE if result.speedup is None else f"{result.speedup:.2f}x",
        number(result.top1, ".3f"),
        _drop(result),
        number(result.agreement, ".3f"),
        # No error at all is infinite SQNR, which JSON cannot say and the report holds as null.
        "inf" if result.sqnr_db is None and result.agreement is not None else number(result.sqnr_db, ".1f"),
        status(result),
    )
    return Row(cells, status(result))


def _drop(result: Result) -> str:
    if result.top1_drop is None:
        return NONE
    if result.top1_drop_ci95 is None:
        return number(result.top1_drop, ".1f")
    low, high = (number(bound, ".1f") for bound in result.top1_drop_ci95)
    return f"{number(result.top1_drop, '.1f')} [{low}, {high}]"


def _times(latency: Latency | None) -> tuple[str, str]:
    if latency is None:
        return NONE, NONE
    mark = "~" if latency.unstable else ""
    return mark + milliseconds(latency.p50), milliseconds(latency.p99)


def _three(value: float) -> str:
    """About three significant digits without an exponent: 0.0421, 3.14, 31.4, 314."""
    digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2 if value >= 0.1 else 4
    return f"{value:.{digits}f}"
