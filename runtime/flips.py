"""Which images an artifact classifies otherwise than FP32 does, from the classes both predicted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from vit_export.runtime.report_schema import Report, Result


@dataclass(frozen=True, slots=True)
class Flip:
    """One image by its index in the evaluation set. label: its true class, None if unknown."""

    image: int
    before: int
    after: int
    label: int | None

    @property
    def outcome(self) -> str:
        """What the flip did: `lost` and `gained` are about a right answer."""
        if self.label is None:
            return "changed"
        return {self.before: "lost", self.after: "gained"}.get(self.label, "wrong both times")


def flips(report: Report, result: Result) -> tuple[Flip, ...] | None:
    """The images whose class changed, in order; None if the report does not hold both predictions.

    Raises InputError if packed predictions are damaged.
    """
    base = report.baseline_for(result.image_size)
    if base is None or base.predictions is None or result.predictions is None:
        return None
    before, after = base.predictions.unpack(), result.predictions.unpack()
    if before.shape != after.shape:
        return None
    packed = report.data.eval.label_ids if report.data.eval else None
    labels = packed.unpack() if packed and packed.count == before.size else None
    return tuple(
        Flip(int(i), int(before[i]), int(after[i]), None if labels is None else int(labels[i]))
        for i in np.flatnonzero(before != after)
    )


def confusion(changed: tuple[Flip, ...]) -> Counter[tuple[int, int]]:
    """How many images went from one class to another: (FP32 class, artifact's class) → images."""
    return Counter((flip.before, flip.after) for flip in changed)
