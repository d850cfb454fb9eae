"""Swin windows that keep their size (transformers, torchvision), as both libraries' forward does.

A stage smaller than the window attends over all of itself: the window shrinks, and its biases are the
learned ones of the same offsets. Only the index into the table changes, so nothing is interpolated.
Stages that are no multiple of the window are padded by the library's forward.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from vit_export.artifacts import Size
from vit_export.models.geometry import show


def relative_index(window: Size, table: Size) -> Tensor:
    """Rows of a relative position table for every pair of tokens in a window: int64 [h*w, h*w].

    table: the window the table was made for, at least as large; its rows are ordered by (dy, dx) from
    (-(H-1), -(W-1)) to (H-1, W-1) (Liu et al. 2021, section 3.2).
    """
    y, x = torch.meshgrid(torch.arange(window[0]), torch.arange(window[1]), indexing="ij")
    dy = y.flatten()[:, None] - y.flatten()[None, :] + table[0] - 1
    dx = x.flatten()[:, None] - x.flatten()[None, :] + table[1] - 1
    return dy * (2 * table[1] - 1) + dx


def padding(stages: Iterable[tuple[Size, Size]]) -> tuple[str, ...]:
    """A note on the stages (tokens, window) whose features are padded to whole windows, none if none is."""
    padded = [f"{show(s)} for {show(w)}" for s, w in dict.fromkeys(stages) if s[0] % w[0] or s[1] % w[1]]
    return (f"features padded to whole windows: {', '.join(padded)}",) if padded else ()


def shrink(window: Size, stage: Size) -> Size:
    """The window in a stage of that many tokens."""
    return min(window[0], stage[0]), min(window[1], stage[1])
