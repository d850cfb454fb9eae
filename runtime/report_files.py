"""Reports on disk: written complete or not at all, read back strictly.

A format is one line in WRITERS: the file's name and a function from Report to bytes, imported when asked
for. report.json is the data; every other format can be made from it again.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

import msgspec

from vit_export.errors import InputError, UsageError
from vit_export.runtime import report_schema
from vit_export.runtime.files import read_bounded, write_atomic
from vit_export.runtime.report_schema import Report

WRITERS: Mapping[str, tuple[str, str]] = {
    "json": ("report.json", "vit_export.runtime.report_schema:encode"),
    "md": ("report.md", "vit_export.runtime.report_markdown:render"),
    "html": ("report.html", "vit_export.runtime.report_html:render"),
    "junit": ("junit.xml", "vit_export.runtime.report_junit:render"),
}
_LOOKS_AROUND = ("html",)  # formats that also show what lies beside the report, see runtime/beside.py
MAX_BYTES = 256 << 20  # a report of a million images is a tenth of this


class _Header(msgspec.Struct):
    """The one field that every version has."""

    schema: str = ""


def write(report: Report, outdir: Path, formats: Iterable[str] = tuple(WRITERS)) -> tuple[Path, ...]:
    """Write the report into `outdir` in each format and return the paths.

    Every format is rendered before the first is written. Raises UsageError for an unknown format or a
    place that cannot be written.
    """
    rendered = [(outdir / _writer(name)[0], render(report, name, outdir)) for name in formats]
    for path, data in rendered:
        write_atomic(path, data)
    return tuple(path for path, _ in rendered)


def render(report: Report, format: str, folder: Path | None = None) -> bytes:
    """The report in one of WRITERS. folder: where pictures and histograms that belong to it may lie.

    Raises UsageError for another format, InputError for something in the folder that is broken.
    """
    module, _, name = _writer(format)[1].partition(":")
    writer = getattr(importlib.import_module(module), name)
    return cast(bytes, writer(report, folder) if format in _LOOKS_AROUND else writer(report))


def read(path: Path) -> Report:
    """A report from its file, or from the folder that holds report.json.

    Raises InputError that says what is wrong and where: no such file, not JSON, another schema version,
    a field missing, unknown or of the wrong type or range.
    """
    path = path / WRITERS["json"][0] if path.is_dir() else path
    return _decode(read_bounded(path, MAX_BYTES, "report"), path)


def _decode(data: bytes, path: Path) -> Report:
    try:
        found = msgspec.json.decode(data, type=_Header).schema
        if found != report_schema.SCHEMA:
            raise InputError(
                f"{path} is not a {report_schema.SCHEMA} report but {found or 'something else'}",
                "it may come from another version of vit-export",
            )
        return report_schema.decode(data)
    except msgspec.ValidationError as error:
        raise InputError(f"{path} is not a valid report: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error


def _writer(format: str) -> tuple[str, str]:
    try:
        return WRITERS[format]
    except KeyError:
        raise UsageError(f"unknown report format {format!r}", f"one of {', '.join(WRITERS)}") from None
