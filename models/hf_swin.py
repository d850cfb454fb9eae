"""transformers' Swin and SwinV2 at other image sizes: windows stay, stages smaller than one shrink it."""

from __future__ import annotations

from math import isqrt
from typing import Any

import torch

from vit_export.artifacts import Positions, Size
from vit_export.models.config import AdaptConfig
from vit_export.models.geometry import Geometry, show
from vit_export.models.hf_resize import pair, resample_parameter
from vit_export.models.positions import Table
from vit_export.models.resizers import Resizer
from vit_export.models.windows import padding, relative_index


class HfSwin(Resizer):
    """SwinModel and Swinv2Model."""

    positions = Positions.RELATIVE
    module: Any

    def geometry(self) -> Geometry:
        patches = self.module.embeddings.patch_embeddings
        patch, grid = pair(patches.patch_size), patches.grid_size
        merges = 2 ** (len(self.module.encoder.layers) - 1)
        window = self.module.config.window_size
        return Geometry(
            (grid[0] * patch[0], grid[1] * patch[1]),
            (patch[0] * merges, patch[1] * merges),
            (patch[0] * window, patch[1] * window),
            f"patch {show(patch)}, {merges}x merging, at least one window of {window}",
        )

    def tables(self) -> tuple[Table, ...]:
        if self.module.embeddings.position_embeddings is None:
            return ()
        grid = self.module.embeddings.patch_embeddings.grid_size
        return (Table("embeddings.position_embeddings", tuple(grid), 0),)

    def prepare(self) -> None:
        """Fix each block's window and shift: transformers changes them for good in the first forward."""
        for blocks, stage in self._stages(self.module.embeddings.patch_embeddings.grid_size):
            for index, block in enumerate(blocks):
                block._made_for = _made_for(block, index)
                _set_window(block, stage)

    def _resize(self, size: Size, config: AdaptConfig) -> tuple[str, ...]:
        embeddings = self.module.embeddings
        patch = pair(embeddings.patch_embeddings.patch_size)
        grid = (size[0] // patch[0], size[1] // patch[1])
        notes = [resample_parameter(self.module, t, grid, config) for t in self.tables()]
        embeddings.patch_grid = embeddings.patch_embeddings.grid_size = grid
        embeddings.patch_embeddings.num_patches = grid[0] * grid[1]
        stages = self._stages(grid)
        for blocks, stage in stages:
            for block in blocks:
                _set_window(block, stage)
                block.input_resolution = stage
        padded = padding((stage, (blocks[0].window_size,) * 2) for blocks, stage in stages)
        return (*notes, f"windows of {self.module.config.window_size} kept", *padded)

    def _stages(self, grid: Size) -> list[tuple[Any, Size]]:
        """Blocks of each stage with the stage's tokens (height, width)."""
        stages = enumerate(self.module.encoder.layers)
        return [(stage.blocks, (grid[0] >> i, grid[1] >> i)) for i, stage in stages]


def _made_for(block: Any, index: int) -> tuple[int, int]:
    """(window, shift) of a block as transformers makes it, before its forward has clamped them."""
    bias = getattr(block.attention, "relative_position_bias", None)
    if bias is None:  # SwinV2 clamps at construction and keeps it
        return block.window_size, block.shift_size
    window = (isqrt(bias.relative_position_bias_table.shape[0]) + 1) // 2
    return window, window // 2 if index % 2 else 0


def _set_window(block: Any, stage: Size) -> None:
    """Window, shift and bias index of a block in a stage of that many tokens."""
    made_window, made_shift = block._made_for
    window = min(made_window, *stage)
    block.window_size = window
    block.shift_size = made_shift if min(stage) > made_window else 0
    index = relative_index((window, window), (made_window, made_window))
    bias = getattr(block.attention, "relative_position_bias", None)
    owner = block.attention.self if bias is None else bias
    owner.window_size = (window, window)
    owner.window_area = window * window
    owner.relative_position_index = torch.nn.Buffer(
        index if bias is None else index.flatten(), persistent=False
    )
