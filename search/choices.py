"""What a search may choose between. A single option is not a choice: it is taken without judging."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from vit_export.artifacts import Decision
from vit_export.calibration.observers import MinMaxConfig, ObserverConfig
from vit_export.errors import UsageError

Rounding = Literal["nearest", "gptq"]

ALPHAS: tuple[float | None, ...] = (None, 0.35, 0.5, 0.65)
"""Exponents tried for equalisation; None leaves channels alone. 1.0 ruins DINOv2-S."""


@dataclass(frozen=True, slots=True)
class Choices:
    """How ranges are observed, and the options of each further method.

    rotate: whether streams and heads are turned (export/rotate.py). alphas: of channel equalisation
    (export/equalize.py), None for none. divide: whether outliers behind a GELU get an operator of their own.
    rounding: of weights. correct_bias: whether mean errors are taken back. budget: seconds after which
    nothing more is tried; None allows three times what plain calibration took, at least five minutes. It
    stops between options.
    """

    observer: ObserverConfig = field(default_factory=MinMaxConfig)
    rotate: tuple[bool, ...] = (False,)
    alphas: tuple[float | None, ...] = (None,)
    divide: tuple[bool, ...] = (False,)
    rounding: tuple[Rounding, ...] = ("nearest",)
    correct_bias: tuple[bool, ...] = (False,)
    budget: float | None = None

    def __post_init__(self) -> None:
        for alpha in self.alphas:
            if alpha is not None and not 0 <= alpha <= 1:
                raise UsageError(f"--equalize {alpha:g} is outside 0..1", "0.5 is usual; or off, or auto")

    @property
    def open(self) -> bool:
        """Whether anything has to be judged."""
        return max(map(len, self.methods)) > 1

    @property
    def methods(self) -> tuple[Sequence[object], ...]:
        """The options of each method, in the order of the search."""
        return self.rotate, self.alphas, self.divide, self.rounding, self.correct_bias


AUTO = Choices(
    rotate=(False, True),
    alphas=ALPHAS,
    divide=(False, True),
    rounding=("nearest", "gptq"),
    correct_bias=(False, True),
)
"""`--calib-method auto`: what --int8 does unless told otherwise."""


def decided(decisions: Sequence[Decision]) -> str:
    """`equalize alpha 0.5, rounding nearest; 28.9 dB, agreement 0.990 on images kept aside`."""
    taken = [d for d in decisions if d.taken and d.choice != "keep float"]
    words = ", ".join(f"{d.choice} {d.option}" for d in taken)
    judged = [d for d in taken if d.sqnr_db is not None and d.agreement is not None]
    if not judged:
        return words
    last = judged[-1]
    return f"{words}; {last.sqnr_db:.1f} dB, agreement {last.agreement:.3f} on images kept aside"
