"""Resampling learned position tables to a new token grid."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor
from torch.nn import functional

from vit_export.artifacts import Size
from vit_export.errors import AmbiguousPositions
from vit_export.models.config import AdaptConfig, PosEmbedMode

Grid = Size  # (rows, columns) of tokens


@dataclass(frozen=True, slots=True)
class Table:
    """A learned table inside a module: parameter `name` holds prefix + grid rows."""

    name: str
    grid: Grid
    prefix: int


def resample_positions(
    table: Tensor, grid: Grid, new: Grid, prefix: int, config: AdaptConfig | None = None
) -> Tensor:
    """Resize a learned position table to a new token grid.

    table: [1, prefix + H*W, C], any float dtype.  Returns [1, prefix + H'*W', C] in the same dtype.
    Prefix rows (class, distillation) are copied. Bicubic with antialias unless `config` says otherwise,
    computed in float32 (Dosovitskiy et al. 2021, section 3.2; timm does the same). The same grid returns
    the table unchanged.

    Raises AmbiguousPositions if table is not prefix + H*W long.
    """
    rows = table.shape[1]
    if rows != prefix + grid[0] * grid[1]:
        raise AmbiguousPositions(
            f"a position table of {rows} rows is not {prefix} prefix tokens + {grid[0]}x{grid[1]}",
            "say how many of its rows are prefix tokens: --prefix-tokens N",
        )
    if new == grid:
        return table
    image = table[:, prefix:].reshape(1, *grid, table.shape[2]).permute(0, 3, 1, 2)
    resized = resample_image(image, new, config).permute(0, 2, 3, 1).reshape(1, -1, table.shape[2])
    return torch.cat([table[:, :prefix], resized], dim=1)


def resample_image(image: Tensor, new: Grid, config: AdaptConfig | None = None) -> Tensor:
    """Resize a position map [1, C, H, W] to [1, C, H', W'] in float32, back in its own dtype."""
    config = config or AdaptConfig()
    smooth = config.mode is not PosEmbedMode.NEAREST
    resized = functional.interpolate(
        image.float(),
        size=new,
        mode=config.mode.value,
        align_corners=False if smooth else None,
        antialias=config.antialias and smooth,
    )
    return resized.to(image.dtype)


def square(tokens: int) -> Grid | None:
    """The square grid of that many tokens, None when there is none."""
    side = isqrt(max(tokens, 0))
    return (side, side) if side and side * side == tokens else None
