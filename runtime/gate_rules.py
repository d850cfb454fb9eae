"""The rules of `vit-export gate`: a TOML file, or the defaults below.

inconclusive_exit = 0            # exit code when there are too few images to decide

[[rule]]
metric = "top1_regression"       # a key of gate_metrics.METRICS
max = 1.0                        # or min = ...
target = "onnx*"                 # globs; all three may be left out
precision = "int8"
image_size = "224x224"
required = true                  # false: a report without the value is not an error
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import msgspec

from vit_export.errors import InputError
from vit_export.python310 import tomllib
from vit_export.runtime.files import read_bounded
from vit_export.runtime.gate_metrics import METRICS
from vit_export.runtime.report_schema import Result

MAX_BYTES = 1 << 20


class Rule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One limit on one metric of every result the globs match. Exactly one of max and min."""

    metric: str
    max: float | None = None
    min: float | None = None
    target: str = "*"
    precision: str = "*"
    image_size: str = "*"
    required: bool = True

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"unknown metric {self.metric!r}, one of {', '.join(METRICS)}")
        if (self.max is None) == (self.min is None):
            raise ValueError(f"{self.metric} needs either max or min")

    @property
    def limit(self) -> float:
        """The number, whichever side it is on."""
        return self.max if self.max is not None else self.min or 0.0

    @property
    def name(self) -> str:
        """`top1_drop <= 1`."""
        return f"{self.metric} {'>=' if self.max is None else '<='} {self.limit:g}"

    def keeps(self, value: float) -> bool:
        """Whether `value` is on the right side."""
        return value >= self.limit if self.max is None else value <= self.limit

    def matches(self, result: Result) -> bool:
        """Whether the globs select `result`."""
        size = f"{result.image_size[0]}x{result.image_size[1]}"
        return (
            fnmatchcase(result.target, self.target)
            and fnmatchcase(result.precision, self.precision)
            and fnmatchcase(size, self.image_size)
        )


class Rules(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All rules of a file. inconclusive_exit: 0..255, what `gate` returns when it cannot decide."""

    rule: tuple[Rule, ...]
    inconclusive_exit: int = 0

    def __post_init__(self) -> None:
        if not self.rule:
            raise ValueError("no rule given")
        if not 0 <= self.inconclusive_exit <= 255:
            raise ValueError(f"inconclusive_exit must be in 0..255, got {self.inconclusive_exit}")


def default_rules(*, baseline: bool) -> Rules:
    """What `gate` checks without a file: accuracy against FP32, and with a baseline report, regressions.

    A tenth of latency is about what two quiet runs on one machine differ by at most; the limits on
    accuracy are those of verdict.Limits. Values that a report does not have are passed over.
    """
    absolute = (
        Rule(metric="top1_drop", max=1.0, required=False),
        Rule(metric="agreement", min=0.9, required=False),
    )
    relative = (
        Rule(metric="top1_regression", max=1.0, required=False),
        Rule(metric="latency_ratio", max=1.1, required=False),
        Rule(metric="bytes_ratio", max=1.1, required=False),
    )
    return Rules(rule=(*absolute, *relative) if baseline else absolute)


def read_rules(path: Path) -> Rules:
    """Rules from a TOML file. Raises InputError with the place of what is wrong."""
    text = read_bounded(path, MAX_BYTES, "file of rules")
    try:
        return msgspec.convert(tomllib.loads(text.decode()), Rules)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not TOML: {error}") from error
    except msgspec.ValidationError as error:
        raise InputError(f"{path}: {error}") from error
