"""transformers: learned tables (ViT, DeiT, MAE, DINOv2), PVT's tables and strides, DINOv3's angles.

transformers resamples its tables inside forward on every call, some families even at their native size, and
takes the grid to be square. Here the table is resampled once and forward takes it as it is. Its own
interpolation is bicubic without antialias (DINOv2 with registers: with), ours with, as timm's.
"""

from __future__ import annotations

from math import lcm
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from vit_export.artifacts import Positions, Size
from vit_export.models.config import AdaptConfig
from vit_export.models.geometry import Geometry, show
from vit_export.models.positions import Table, resample_positions
from vit_export.models.resizers import Resizer

_NAME = "position_embeddings"


class HfTable(Resizer):
    """The embeddings of ViT, DeiT, ViTMAE, DINOv2 and alike: one table, any number of prefix tokens."""

    positions = Positions.ABSOLUTE
    module: Any

    def geometry(self) -> Geometry:
        patches = self.module.patch_embeddings
        patch = pair(patches.patch_size)
        return Geometry(pair(patches.image_size), patch, reason=f"patch {show(patch)}")

    def tables(self) -> tuple[Table, ...]:
        table = getattr(self.module, _NAME)
        if table is None:
            return ()
        geometry = self.geometry()
        grid = geometry.grid(geometry.size)
        return (Table(_NAME, grid, table.shape[1] - grid[0] * grid[1]),)

    def prepare(self) -> None:
        self.module.interpolate_pos_encoding = MethodType(_whole_table, self.module)
        if hasattr(self.module, "random_masking"):  # MAE: the encoder sees every patch, in order
            self.module.random_masking = MethodType(_keep_all, self.module)

    def _resize(self, size: Size, config: AdaptConfig) -> tuple[str, ...]:
        grid = self.geometry().grid(size)
        notes = tuple(resample_parameter(self.module, table, grid, config) for table in self.tables())
        patches = self.module.patch_embeddings
        patches.image_size, patches.num_patches = size, grid[0] * grid[1]
        if hasattr(self.module, "image_size"):
            self.module.image_size = size
        return notes


class HfPvt(Resizer):
    """PVT v1: each of the stages has a table of its own, the last one with a class token."""

    positions = Positions.ABSOLUTE
    module: Any  # PvtEncoder

    def geometry(self) -> Geometry:
        size = pair(self.module.patch_embeddings[0].image_size)
        ratios = self.module.config.sequence_reduction_ratios
        step = lcm(*(s * r for s, r in zip(self._strides(), ratios, strict=True)))
        return Geometry(size, (step, step), reason="stage strides and spatial reduction")

    def prepare(self) -> None:
        for stage in self.module.patch_embeddings:
            stage.interpolate_pos_encoding = MethodType(_given_table, stage)

    def tables(self) -> tuple[Table, ...]:
        size, stages = self.geometry().size, self.module.patch_embeddings
        return tuple(
            Table(
                f"patch_embeddings.{i}.{_NAME}",
                (size[0] // stride, size[1] // stride),
                int(stages[i].cls_token is not None),
            )
            for i, stride in enumerate(self._strides())
        )

    def _resize(self, size: Size, config: AdaptConfig) -> tuple[str, ...]:
        tables, notes = self.tables(), []
        for stage, table, stride in zip(self.module.patch_embeddings, tables, self._strides(), strict=True):
            grid = (size[0] // stride, size[1] // stride)
            notes.append(resample_parameter(self.module, table, grid, config))
            stage.num_patches = grid[0] * grid[1]
        self.module.patch_embeddings[0].image_size = size
        return tuple(notes)

    def _strides(self) -> list[int]:
        """Pixels of the image to one token, per stage."""
        strides, total = [], 1
        for stage in self.module.patch_embeddings:
            total *= stage.projection.stride[0]
            strides.append(total)
        return strides


class HfPvt2(Resizer):
    """PVTv2: positions come from padded convolutions, so only the strides must divide."""

    positions = Positions.NONE
    module: Any  # PvtV2Model

    def geometry(self) -> Geometry:
        config = self.module.config
        total, steps = 1, []
        for stride, ratio in zip(config.strides, config.sr_ratios, strict=True):
            total *= stride
            steps.append(total * (1 if config.linear_attention else ratio))
        step = lcm(*steps)
        size = self._size or pair(config.image_size)
        return Geometry(size, (step, step), reason="stage strides and spatial reduction")

    def _resize(self, size: Size, config: AdaptConfig) -> tuple[str, ...]:
        return ()


class HfRotary(Resizer):
    """DINOv3: angles follow from the grid; they are computed once and kept as constants."""

    positions = Positions.ROTARY
    module: Any  # DINOv3ViTRopePositionEmbedding

    def geometry(self) -> Geometry:
        config = self.module.config
        patch = pair(config.patch_size)
        return Geometry(self._size or pair(config.image_size), patch, reason=f"patch {show(patch)}")

    def prepare(self) -> None:
        self._keep(self.geometry().size)
        self.module.forward = MethodType(_kept_angles, self.module)

    def _resize(self, size: Size, config: AdaptConfig) -> tuple[str, ...]:
        self._keep(size)
        return ("rotary angles computed for the new grid",)

    def _keep(self, size: Size) -> None:
        with torch.no_grad():
            cos, sin = type(self.module).forward(self.module, torch.zeros(1, 3, *size))
        self.module.register_buffer("cos", cos.clone(), persistent=False)
        self.module.register_buffer("sin", sin.clone(), persistent=False)


def resample_parameter(owner: nn.Module, table: Table, grid: Size, config: AdaptConfig) -> str:
    """Replace the parameter `table.name` of `owner` by its resampling to `grid`; says so."""
    path, _, name = table.name.rpartition(".")
    module = owner.get_submodule(path)
    with torch.no_grad():
        resampled = resample_positions(getattr(module, name), table.grid, grid, table.prefix, config)
    setattr(module, name, nn.Parameter(resampled, requires_grad=False))
    return f"{table.name} resampled from {show(table.grid)} to {show(grid)}"


def pair(value: Any) -> Size:
    """`224` or `(224, 288)` as (height, width)."""
    height, width = value if isinstance(value, tuple | list) else (value, value)
    return int(height), int(width)


def _whole_table(self: Any, embeddings: Tensor, height: int, width: int) -> Tensor:
    table: Tensor = self.position_embeddings
    return table


def _given_table(self: Any, embeddings: Tensor, height: int, width: int) -> Tensor:
    return embeddings


def _keep_all(self: Any, sequence: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    order = torch.arange(sequence.shape[1]).expand(sequence.shape[0], -1)
    return sequence, torch.zeros_like(sequence[..., 0]), order


def _kept_angles(self: Any, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    return self.cos, self.sin
