"""Where float16 overflows, found in the traced program before any device does.

The program runs in float32 on a few images and every float tensor is reduced to its largest magnitude.
What exceeds 65504 is Inf in float16; the module path it was traced in is the name a user knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from vit_export.artifacts import Images, Program
from vit_export.errors import NumericsError
from vit_export.export.graph import module_path

HALF_MAX = 65504.0
_SHOWN = 4


class _Peaks(Interpreter):
    """Runs a graph and keeps, by module path, the largest |x| that any of its operators gave."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.graph)
        self.peaks: dict[str, float] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.op == "call_function" and isinstance(value, Tensor) and value.is_floating_point():
            self._see(module_path(n) or n.name, value)
        return value

    def _see(self, path: str, value: Tensor) -> None:
        if value.numel() == 0:
            return
        low, high = (float(extreme) for extreme in torch.aminmax(value))
        peak = max(-low, high)
        if peak != peak:
            raise NumericsError(f"NaN first in {path}", "look for broken weights or an overflow before it")
        if peak != float("inf"):  # masks hold -inf, in float16 as well
            self.peaks[path] = max(peak, self.peaks.get(path, 0.0))


def half_overflows(program: Program, samples: Images) -> Mapping[str, float]:
    """Module path → largest |x| seen in it, for every module beyond what float16 holds.

    samples: float32 [n, 3, H, W], run in the program's own batch or one by one.
    Raises NumericsError for NaN in float32 itself.
    """
    watch = _Peaks(program)
    step = 1 if program.dynamic_batch else program.batch_size
    with torch.inference_mode():
        for start in range(0, len(samples), step):
            part = np.resize(samples[start : start + step], (step, *samples.shape[1:]))
            watch.run(torch.from_numpy(part))
    return {path: peak for path, peak in watch.peaks.items() if peak > HALF_MAX}


def overflow_words(overflows: Mapping[str, float]) -> str:
    """One sentence for a report; empty for none."""
    if not overflows:
        return ""
    worst = sorted(overflows.items(), key=lambda item: -item[1])
    named = ", ".join(f"{path} ({peak:.3g})" for path, peak in worst[:_SHOWN])
    more = f" and {len(worst) - _SHOWN} more" if len(worst) > _SHOWN else ""
    return f"float16 holds 65504 at most and overflows in {named}{more}"
