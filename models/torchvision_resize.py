"""torchvision's ViT and Swin: other names for the same things, and a ViT that insists on square images."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from vit_export.artifacts import Positions, Size
from vit_export.models.config import AdaptConfig
from vit_export.models.geometry import Geometry, show
from vit_export.models.hf_resize import pair, resample_parameter
from vit_export.models.positions import Table
from vit_export.models.resizers import Resizer
from vit_export.models.windows import padding, relative_index, shrink


class TorchvisionVit(Resizer):
    """VisionTransformer: vit_b_16 and alike."""

    positions = Positions.ABSOLUTE
    module: Any

    def geometry(self) -> Geometry:
        patch = pair(self.module.patch_size)
        return Geometry(pair(self.module.image_size), patch, reason=f"patch {self.module.patch_size}")

    def tables(self) -> tuple[Table, ...]:
        geometry = self.geometry()
        return (Table("encoder.pos_embedding", geometry.grid(geometry.size), 1),)

    def prepare(self) -> None:
        """Its own patch embedding compares both sides with one integer; take the check out."""
        self.module._process_input = MethodType(_patches, self.module)

    def _resize(self, size: Size, config: AdaptConfig) -> tuple[str, ...]:
        grid = self.geometry().grid(size)
        notes = tuple(resample_parameter(self.module, t, grid, config) for t in self.tables())
        self.module.image_size = size
        self.module.seq_length = 1 + grid[0] * grid[1]
        return notes


class TorchvisionSwin(Resizer):
    """SwinTransformer with v1 or v2 blocks: windows stay, stages smaller than one shrink it."""

    positions = Positions.RELATIVE
    module: Any

    def geometry(self) -> Geometry:
        patch, stages, window = self._patch(), self._stages(), self._window()
        merges = 2 ** (len(stages) - 1)
        return Geometry(
            self._size or (224, 224),
            (patch[0] * merges, patch[1] * merges),
            (patch[0] * window[0], patch[1] * window[1]),
            f"patch {show(patch)}, {merges}x merging, at least one window of {show(window)}",
        )

    def prepare(self) -> None:
        for blocks in self._stages():
            for block in blocks:
                block.attn._made_for = tuple(block.attn.window_size)

    def _resize(self, size: Size, config: AdaptConfig) -> tuple[str, ...]:
        patch, stages = self._patch(), []
        for number, blocks in enumerate(self._stages()):
            stage = (size[0] // patch[0] >> number, size[1] // patch[1] >> number)
            for block in blocks:
                window = shrink(block.attn._made_for, stage)
                block.attn.window_size = list(window)
                block.attn.relative_position_index = relative_index(window, block.attn._made_for).flatten()
                stages.append((stage, window))
        return (f"windows of {show(self._window())} kept", *padding(stages))

    def _patch(self) -> Size:
        return pair(self.module.features[0][0].stride)

    def _stages(self) -> list[Any]:
        return [
            part for part in self.module.features if all(hasattr(block, "attn") for block in _blocks(part))
        ]

    def _window(self) -> Size:
        attention = self._stages()[0][0].attn
        return pair(getattr(attention, "_made_for", attention.window_size))


def _blocks(part: nn.Module) -> list[nn.Module]:
    """The blocks of a stage; anything else is one thing without attention."""
    return list(part) if isinstance(part, nn.Sequential) else [part]


def _patches(self: Any, images: Tensor) -> Tensor:
    tokens: Tensor = self.conv_proj(images)
    return torch.flatten(tokens, 2).transpose(1, 2)
