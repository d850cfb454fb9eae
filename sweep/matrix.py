"""sweep.toml: which cells there are. An axis is any option of `vit-export`, under its name without dashes.

output = "sweep-out"                  # reports and artifacts
store = "s3://team/vit-export"        # finished stages; a folder or an fsspec URL, default OUTPUT/store
part = 512                            # evaluation images a task

[options]                             # of every cell
calib = "photos/calib"
eval = "s3://team/photos/eval"

[matrix]
model = ["digits-vit", { model = "timm:deit_tiny_patch16_224", checkpoint = "deit.safetensors" }]
image-size = [96, 128]
target = ["onnx", "openvino"]
precision = ["fp32", "int8"]

[[exclude]]                           # cells with all of these values
target = "openvino"
precision = "fp32"

[[include]]                           # one more cell; what it leaves out comes from [options]
model = "digits-vit"
target = "coreml"
precision = "fp16"
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from vit_export.artifacts import Precision
from vit_export.errors import InputError, UsageError
from vit_export.job import ExportJob
from vit_export.python310 import tomllib
from vit_export.runtime.files import read_bounded

MAX_BYTES = 1 << 20
MAX_CELLS = 100_000
_OWN = ("image-size", "target", "precision")  # what tells cells of one report apart

Options = dict[str, Any]


class SweepFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file as it is written.

    part: a multiple of 32 (batches, and the images on which losses are split): no number depends on it.
    """

    matrix: dict[str, list[Any]] = {}
    options: Options = {}
    include: list[Options] = []
    exclude: list[Options] = []
    output: Path = Path("sweep-out")
    store: str | None = None
    part: int = 512

    def __post_init__(self) -> None:
        if self.part < 32 or self.part % 32:
            raise ValueError(f"part must be a multiple of 32, got {self.part}")
        if not self.matrix and not self.include:
            raise ValueError("there is neither a [matrix] nor an [[include]]")
        if empty := next((name for name, values in self.matrix.items() if not values), None):
            raise ValueError(f"the axis {empty} has no value")


@dataclass(frozen=True, slots=True)
class Cell:
    """One model at one size for one target in one precision. options: what tells it from the others.

    group: its report; cells of one report differ in image size, target and precision only.
    """

    group: str
    options: Mapping[str, str]
    job: ExportJob

    @property
    def name(self) -> str:
        """`digits-vit / onnx int8 96`."""
        size = "x".join(str(side) for side in self.job.image_sizes[0]) if self.job.image_sizes else "native"
        return f"{self.group} / {self.job.targets[0]} {self.job.precisions[0]} {size}"


def read(path: Path) -> SweepFile:
    """Raises InputError with the place of what is wrong."""
    text = read_bounded(path, MAX_BYTES, "sweep's file")
    try:
        return msgspec.convert(tomllib.loads(text.decode()), SweepFile, dec_hook=_path)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not TOML: {error}") from error
    except msgspec.ValidationError as error:
        raise InputError(f"{path}: {error}") from error


def cells(file: SweepFile, make_job: Callable[[Mapping[str, Any]], ExportJob]) -> tuple[Cell, ...]:
    """The cells of a file, each once. make_job: a job of options by their names, unknown ones refused.

    Raises UsageError for an option that does not exist or a value it cannot have.
    """
    given = [*_product(file.matrix), *(_flat(options) for options in file.include)]
    kept = [options for options in given if not any(_matches(options, rule) for rule in file.exclude)]
    if not kept:
        raise UsageError("the sweep has no cell", "every one of the matrix is excluded")
    if len(kept) > MAX_CELLS:
        raise UsageError(f"the sweep has {len(kept)} cells, more than {MAX_CELLS}")
    varying = [name for name in dict.fromkeys(n for o in kept for n in o) if len(_values(kept, name)) > 1]
    made = {_name(o, [*varying, *_OWN]): _cell(file, o, varying, make_job) for o in kept}
    return tuple(made.values())


def _product(matrix: Mapping[str, Sequence[Any]]) -> Iterator[Options]:
    if not matrix:
        return
    total = 1
    for values in matrix.values():
        total *= len(values)
    if total > MAX_CELLS:
        raise UsageError(f"the matrix has {total} cells, more than {MAX_CELLS}")
    for values in itertools.product(*matrix.values()):
        yield _flat(dict(zip(matrix, values, strict=True)))


def _flat(options: Options) -> Options:
    """An axis whose value is a table sets all of its options (a model with its checkpoint)."""
    found: Options = {}
    for name, value in options.items():
        found |= value if isinstance(value, dict) else {name: value}
    return found


def _matches(options: Options, rule: Options) -> bool:
    return all(str(options.get(name)) == str(value) for name, value in _flat(rule).items())


def _values(rows: Sequence[Options], name: str) -> set[str]:
    return {str(options.get(name)) for options in rows}


def _name(options: Options, names: Sequence[str]) -> str:
    return " ".join(str(options[name]) for name in names if name in options)


def _cell(
    file: SweepFile,
    options: Options,
    varying: Sequence[str],
    make_job: Callable[[Mapping[str, Any]], ExportJob],
) -> Cell:
    group = _name(options, [name for name in varying if name not in _OWN])
    precision = str(options.get("precision", "fp32"))
    if precision not in tuple(Precision):
        raise UsageError(f"unknown precision {precision!r}", f"one of {', '.join(Precision)}")
    asked = {name: value for name, value in {**file.options, **options}.items() if name != "precision"}
    job = make_job({**asked, precision: True})
    if len(job.targets) != 1 or len(job.image_sizes) > 1 or len(job.precisions) != 1:
        raise UsageError("a cell is one size, target and precision", "give several in [matrix]")
    shown = {name: str(options[name]) for name in varying if name in options}
    job = replace(_absolute(job), part=file.part, bundle_images=None)
    return Cell(group or str(options.get("model", job.model)), shown, only_what_matters(job))


def _absolute(job: ExportJob) -> ExportJob:
    """Paths as they are seen from here: a worker has a working directory of its own."""

    def full(path: Any) -> Any:
        return path.absolute() if isinstance(path, Path) else path

    file, colon, factory = job.model.rpartition(":") if ".py:" in job.model else (job.model, "", "")
    kind, rest = ("hf:", file.removeprefix("hf:")) if file.startswith("hf:") else ("", file)
    here = kind + str(Path(rest).absolute()) if Path(rest).exists() else file
    return replace(
        job,
        model=f"{here}{colon}{factory}",
        load=replace(job.load, checkpoint=full(job.load.checkpoint)),
        calib=full(job.calib),
        evaluation=full(job.evaluation),
        options={name: full(value) for name, value in job.options.items()},
    )


def only_what_matters(job: ExportJob) -> ExportJob:
    """Without int8 nothing is calibrated, so no option of calibration may tell two float cells apart.

    With --calib alone its images are also those judged on, and stay.
    """
    if Precision.INT8 in job.precisions or (job.calib is not None and job.evaluation is None):
        return job
    plain = ExportJob()
    return replace(
        job, calib=None, calib_size=plain.calib_size, choices=plain.choices, keep_float=plain.keep_float,
        sensitivity=False,
    )  # fmt: skip


def _path(kind: type, value: Any) -> Any:
    if issubclass(kind, Path) and isinstance(value, str):
        return Path(value)
    raise ValueError(f"expected {kind.__name__}")
