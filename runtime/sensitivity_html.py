"""How int8 was decided, in report.html: what the search tried, and which layers int8 hurts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from vit_export.artifacts import Decision, LayerSensitivity, QuantPlan
from vit_export.errors import InputError
from vit_export.runtime.html_charts import Bar, available, bars, figure
from vit_export.runtime.html_tree import Node, el, table
from vit_export.runtime.report_cells import number
from vit_export.runtime.report_schema import Report

_MANY = 40  # layers in the chart, the most sensitive ones; the table has all
_HEADERS = ("layer", "kind", "MMAC", "alone dB", "without dB", "kept float")
_MAX_BYTES = 16 << 20


def parts(report: Report, folder: Path | None) -> Iterator[Node | None]:
    """The search's options, a chart of the most sensitive layers and a table of all; nothing without them.

    folder: where plan.json may lie, which says why a layer stays float. Raises InputError if it is broken.
    """
    yield decisions(report.decisions)
    kept = kept_float(report, folder)
    chart = drawing(report.sensitivity, kept) if available() else None
    yield el("div", chart, class_="charts") if chart is not None else None
    body = [
        (
            row.layer,
            row.kind,
            number(row.macs / 1e6, ".1f"),
            number(row.sqnr_alone_db, ".1f"),
            number(row.sqnr_without_db, ".1f"),
            (f"yes: {kept[row.layer]}" if kept[row.layer] else "yes") if row.layer in kept else "no",
        )
        for row in report.sensitivity
    ]
    yield table("Sensitivity of every layer", _HEADERS, body, numbers=False)


def decisions(tried: Sequence[Decision]) -> Node | None:
    """Every option that was judged on calibration images kept aside, and which was taken."""
    body = [
        (
            one.choice,
            one.option,
            "yes" if one.taken else "no",
            number(one.sqnr_db, ".1f"),
            number(one.agreement, ".3f"),
            one.note or "-",
        )
        for one in tried
    ]
    headers = ("choice", "option", "taken", "SQNR dB", "agreement", "note")
    return table("What the search tried", headers, body, numbers=False)


def kept_float(report: Report, folder: Path | None) -> Mapping[str, str]:
    """The layers that an int8 artifact keeps float, with the plan's reason where it is known."""
    names = {name for result in report.results for name in result.kept_float}
    path = folder / "plan.json" if folder is not None and names else None
    if path is None or not path.is_file():
        return dict.fromkeys(names, "")
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InputError(f"{path} is too large: {path.stat().st_size} bytes")
        plan = msgspec.json.decode(path.read_bytes(), type=QuantPlan)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a plan: {error}") from error
    reasons = {layer.name: layer.reason for layer in plan.layers}
    return {name: reasons.get(name, "") for name in names}


def drawing(rows: Sequence[LayerSensitivity], kept: Mapping[str, str]) -> Node | None:
    """SQNR of the model's output with only one layer in int8, lowest first."""
    known = [(row.layer, row.sqnr_alone_db) for row in rows if row.sqnr_alone_db is not None]
    shown = sorted(known, key=lambda pair: pair[1])[:_MANY]
    if not shown:
        return None
    labels = [f"{name} (kept float)" if name in kept else name for name, _ in shown]
    series = {"alone": [Bar(db, marked=name in kept) for name, db in shown]}
    words = "; ".join(f"{label}: {db:.1f} dB" for label, (_, db) in zip(labels, shown, strict=True))
    more = f" The {len(shown)} most sensitive of {len(known)}." if len(known) > len(shown) else ""
    caption = f"SQNR of the output, dB, with only this layer in int8; shorter is more sensitive.{more}"
    return figure("Sensitivity by layer", caption, words, bars(labels, series))
