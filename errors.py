"""Every error a user can meet. Each says what, where and what next.

VitExportError                     exit code
├── UsageError                     2   an option or argument that cannot work
│   ├── BadSize                        an image size the model cannot take
│   └── AmbiguousPositions             a position table that could be read in several ways
├── InputError                     2   a file the user gave is missing, broken or does not fit
│   ├── CheckpointError                keys or shapes of a checkpoint do not match the model
│   └── UntrustedInput                 a file that would have to be executed or leaves its folder
├── TargetError                    3   a requested target cannot be built or run here
│   ├── MissingExtra                   an optional package is not installed
│   ├── UnsupportedOperator            an operator the target does not take, with its module path
│   ├── ParityError                    an exported graph does not reproduce its source
│   └── RunnerError                    a runtime refused, failed or returned something impossible
│       ├── WorkerCrash                    its process died, with the signal and its last words
│       └── WorkerTimeout                  its process did not answer in time and was ended
└── NumericsError                  2   NaN or Inf in weights, activations or outputs, with its place
Anything else that reaches the command line is a bug and exits with 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


class VitExportError(Exception):
    """Base of all errors shown to users. `hint` is the next step, printed under the message."""

    exit_code: ClassVar[int] = 4

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class UsageError(VitExportError):
    """An option, argument or combination of them that cannot work."""

    exit_code = 2


class BadSize(UsageError):
    """Image sizes that the model cannot take; names the nearest sizes that it can."""

    def __init__(self, asked: Sequence[str], model: str, rule: str, nearest: Sequence[str]) -> None:
        self.asked, self.model, self.rule, self.nearest = asked, model, rule, nearest
        near = f"; nearest: {', '.join(nearest)}" if nearest else ""
        verb = "does not fit" if len(asked) == 1 else "do not fit"
        super().__init__(f"--image-size {', '.join(asked)} {verb} {model}", f"{rule}{near}")

    @classmethod
    def together(cls, errors: Sequence[BadSize]) -> BadSize:
        """One error for all sizes of one model that do not fit."""
        asked = [size for error in errors for size in error.asked]
        rules = dict.fromkeys(error.rule for error in errors)
        near = dict.fromkeys(size for error in errors for size in error.nearest)
        return cls(asked, errors[0].model, "; ".join(rules), list(near))


class AmbiguousPositions(UsageError):
    """A position table whose split into prefix tokens and grid is not certain."""


class InputError(VitExportError):
    """A file given by the user is missing, unreadable or does not fit the rest."""

    exit_code = 2


class CheckpointError(InputError):
    """A checkpoint whose keys or shapes do not match the model."""


class UntrustedInput(InputError):
    """A file that would run code or write outside its folder if it were taken as it is."""


class NumericsError(VitExportError):
    """NaN or Inf was found; the message names the module path."""

    exit_code = 2


class TargetError(VitExportError):
    """A requested target cannot be built or run on this machine."""

    exit_code = 3


class MissingExtra(TargetError):
    """An optional package is missing; the hint is the pip command that installs it."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed", f"pip install 'vit-export[{extra}]'")
        self.package = package
        self.extra = extra


class UnsupportedOperator(TargetError):
    """The target does not take an operator; the message carries the operator and its module path."""


class ParityError(TargetError):
    """An exported graph does not reproduce the numbers of its source within tolerance."""


class RunnerError(TargetError):
    """A runtime refused an artifact, crashed, hung or returned an impossible output."""


class WorkerCrash(RunnerError):
    """A runtime's process died or broke the protocol. `signal` is its name (`SIGSEGV`) or None."""

    def __init__(self, message: str, stderr: Sequence[str] = (), signal: str | None = None) -> None:
        super().__init__(message, f"last words: {stderr[-1]}" if stderr else "")
        self.stderr = tuple(stderr)
        self.signal = signal


class WorkerTimeout(RunnerError):
    """A runtime's process did not answer in time and was ended."""

    def __init__(self, message: str, stderr: Sequence[str] = ()) -> None:
        super().__init__(message, f"last words: {stderr[-1]}" if stderr else "")
        self.stderr = tuple(stderr)
