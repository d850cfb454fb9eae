"""timm's own resizing, called where timm can do it: ViT, DeiT, DINOv2, EVA, DINOv3, BEiT, Swin, SwinV2, ...

timm resamples learned tables bicubically with antialias in float32 and scales Swin's windows with the
token grid, so a 7x7 window made for 224 becomes 8x8 at 256 (Swin's authors went from 7 to 12 for 384).
Relative tables of BEiT and Swin go through timm's geometric interpolation of the BEiT authors.
"""

from __future__ import annotations

import warnings
from math import gcd, lcm
from typing import Any, cast

import torch
from torch import nn

from vit_export.artifacts import Positions, Size
from vit_export.models.config import AdaptConfig, PosEmbedMode
from vit_export.models.geometry import Geometry, show
from vit_export.models.positions import Table, resample_positions
from vit_export.models.resizers import Resizer

_TIMMS = (PosEmbedMode.BICUBIC, True)  # what set_input_size does by itself


class TimmSized(Resizer):
    """A timm model with one patch embedding and `set_input_size`."""

    positions = Positions.ABSOLUTE
    module: Any  # timm ships no types

    def scheme(self) -> Positions:
        model = self.module
        if getattr(model, "rope", None) is not None:
            return Positions.ROTARY
        if any("relative_position" in n or "rel_pos" in n for n, _ in model.named_parameters()):
            return Positions.RELATIVE
        return Positions.ABSOLUTE if getattr(model, "pos_embed", None) is not None else Positions.NONE

    def geometry(self) -> Geometry:
        patch = self._patch()
        return Geometry(tuple(self.module.patch_embed.img_size), patch, reason=f"patch {_side(patch)}")

    def tables(self) -> tuple[Table, ...]:
        table, grid = getattr(self.module, "pos_embed", None), self.module.patch_embed.grid_size
        if table is None or table.ndim != 3:
            return ()
        return (Table("pos_embed", tuple(grid), table.shape[1] - grid[0] * grid[1]),)

    def prepare(self) -> None:
        """A model made with dynamic_img_size would resample its table in the graph; give it a fixed size."""
        model = self.module
        if getattr(model, "dynamic_img_size", False) and getattr(model, "rope", None) is None:
            model.dynamic_img_size = False
            model.patch_embed.flatten = True

    def _resize(self, size: Size, config: AdaptConfig) -> tuple[str, ...]:
        model = self.module
        tables, learned = self.tables(), cast(nn.Parameter, getattr(model, "pos_embed", None))
        _set_input_size(model, size)
        grid = tuple(model.patch_embed.grid_size)
        for table in tables if (config.mode, config.antialias) != _TIMMS else ():
            with torch.no_grad():
                resampled = resample_positions(learned, table.grid, grid, table.prefix, config)
            model.pos_embed = nn.Parameter(resampled, learned.requires_grad)
        return tuple(f"{t.name} resampled from {show(t.grid)} to {show(grid)}" for t in tables)

    def _patch(self) -> Size:
        embed = self.module.patch_embed
        height, width = (
            embed.feat_ratio(as_scalar=False) if hasattr(embed, "feat_ratio") else embed.patch_size
        )
        return int(height), int(width)


class TimmSwin(TimmSized):
    """Swin and SwinV2: windows keep their share of the grid, so sizes that divide evenly need no padding."""

    def scheme(self) -> Positions:
        return Positions.RELATIVE

    def geometry(self) -> Geometry:
        model = self.module
        patch = self._patch()
        merges = 2 ** (len(model.layers) - 1)
        steps = [self._window_step(axis) for axis in (0, 1)]
        multiple = tuple(p * lcm(merges, step) for p, step in zip(patch, steps, strict=True))
        windows = model._ref_window_sizes[0]
        return Geometry(
            tuple(model.patch_embed.img_size),
            (multiple[0], multiple[1]),
            self._minimum(),
            f"patch {_side(patch)}, {merges}x merging, window {_side(windows)}",
        )

    def _window_step(self, axis: int) -> int:
        """The grid must be a multiple of this for every stage's scaled window to be whole."""
        grid = self.module._ref_grid_size[axis]
        return lcm(*(grid // gcd(window[axis], grid) for window in self.module._ref_window_sizes))

    def _minimum(self) -> Size:
        """The smallest size whose scaled first window still holds 2x2 tokens."""
        patch, grid, window = self._patch(), self.module._ref_grid_size, self.module._ref_window_sizes[0]
        height, width = (p * -(-2 * g // w) for p, g, w in zip(patch, grid, window, strict=True))
        return height, width

    def _resize(self, size: Size, config: AdaptConfig) -> tuple[str, ...]:
        before = self.module.layers[0].blocks[0].window_size
        _set_input_size(self.module, size)
        after = self.module.layers[0].blocks[0].window_size
        return (f"windows {show(before)} → {show(after)}, relative positions resampled",)


class TimmFree(Resizer):
    """timm models without position tables: any size that the strides divide (PVTv2)."""

    positions = Positions.NONE
    module: Any

    def geometry(self) -> Geometry:
        step = lcm(*(self._stage_step(i) for i in range(len(self.module.stages))))
        config = getattr(self.module, "pretrained_cfg", None) or {}  # only timm.create_model sets it
        stated = tuple(config.get("input_size", ())[1:])
        size = self._size or stated or self.hint or (224, 224)
        return Geometry(size, (step, step), reason="stage strides and spatial reduction")

    def _stage_step(self, index: int) -> int:
        convs = [block.attn.sr for block in self.module.stages[index].blocks]
        reduction = max((c.stride[0] for c in convs if c is not None), default=1)
        return int(self.module.feature_info[index]["reduction"]) * reduction

    def _resize(self, size: Size, config: AdaptConfig) -> tuple[str, ...]:
        return ()


def _set_input_size(model: Any, size: Size) -> None:
    with warnings.catch_warnings():  # timm's interpolation indexes with a list, torch warns about it
        warnings.simplefilter("ignore", UserWarning)
        model.set_input_size(img_size=size)


def _side(size: Size) -> str:
    return str(size[0]) if size[0] == size[1] else show(size)
