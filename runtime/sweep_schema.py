"""The result of a sweep: an ordinary report for each group of cells, and one table over all of them.

Read and gated on any machine with the base install. Schema vit-export.sweep/1; values as in report_schema.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from vit_export.artifacts import Precision
from vit_export.errors import InputError
from vit_export.runtime import report_schema
from vit_export.runtime.files import read_bounded
from vit_export.runtime.report_schema import Count, Part, Report

SCHEMA: Literal["vit-export.sweep/1"] = "vit-export.sweep/1"
NAME = "sweep.json"
MAX_BYTES = 1 << 30


class SweepCell(Part, frozen=True, kw_only=True):
    """One cell. device: the processor it was timed on, else run on. accuracy: top-1, or agreement.

    pareto: no other cell of its device and images is at least as good in accuracy, latency and size, and
    better in one. made: stages that ran for it this time; none if all were in the store.
    """

    group: str
    target: str
    precision: Precision
    options: dict[str, str] = msgspec.field(default_factory=dict)
    image_size: tuple[int, int] | None = None
    status: Literal["ok", "not_run", "failed"]
    reason: str = ""
    verdict: Literal["ship", "hold"] | None = None
    device: str = ""
    images: str = ""
    accuracy: float | None = None
    p50_ms: float | None = None
    bytes: Count | None = None
    pareto: bool = False
    made: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """`timm:deit_tiny_patch16_224 / onnx int8 224x224`."""
        size = f" {self.image_size[0]}x{self.image_size[1]}" if self.image_size else ""
        return f"{self.group} / {self.target} {self.precision}{size}"


class StageWork(Part, frozen=True, kw_only=True):
    """What one stage cost in all: how often it ran, was found in the store or failed, time and traffic.

    each: seconds of every task that ran, in no order; what `benchmarks/sweep_plan.py` plans with.
    """

    stage: str
    made: Count = 0
    reused: Count = 0
    failed: Count = 0
    seconds: float = 0.0
    each: tuple[float, ...] = ()
    read_bytes: Count = 0
    written_bytes: Count = 0


class Sweep(Part, frozen=True, kw_only=True):
    """A whole sweep. groups: reports by name. seconds: from the first task to the last."""

    created: Annotated[datetime, Meta(tz=True)]
    command: str
    groups: dict[str, Report]
    cells: tuple[SweepCell, ...]
    work: tuple[StageWork, ...] = ()
    workers: Count = 0
    seconds: float = 0.0
    schema: Literal["vit-export.sweep/1"] = SCHEMA


def encode(sweep: Sweep) -> bytes:
    """The sweep as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(sweep, enc_hook=report_schema.plain), indent=2) + b"\n"


def read(path: Path) -> Sweep:
    """From sweep.json or the folder that holds it. Raises InputError for anything else."""
    path = path / NAME if path.is_dir() else path
    data = read_bounded(path, MAX_BYTES, "sweep")
    try:
        return msgspec.json.decode(data, type=Sweep)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InputError(f"{path} is not a valid sweep: {error}") from error


def is_sweep(path: Path) -> bool:
    """Whether a path names a sweep rather than a report."""
    if path.is_dir():
        return (path / NAME).is_file() and not (path / "report.json").is_file()
    return path.name == NAME


def with_pareto(cells: Sequence[SweepCell]) -> tuple[SweepCell, ...]:
    """The cells with `pareto` set, each judged among those of its device and evaluation images."""
    return tuple(msgspec.structs.replace(cell, pareto=_best(cell, cells)) for cell in cells)


def _best(cell: SweepCell, cells: Iterable[SweepCell]) -> bool:
    mine = _costs(cell)
    if mine is None:
        return False
    for other in cells:
        theirs = _costs(other)
        if theirs is None or (other.device, other.images) != (cell.device, cell.images):
            continue
        if theirs != mine and all(a <= b for a, b in zip(theirs, mine, strict=True)):
            return False
    return True


def _costs(cell: SweepCell) -> tuple[float, float, float] | None:
    """What is better when it is lower; None for a cell that was not measured."""
    values: tuple[Any, ...] = (cell.accuracy, cell.p50_ms, cell.bytes)
    if cell.status != "ok" or any(value is None for value in values):
        return None
    return -values[0], values[1], values[2]
