"""transformers' BEiT: relative bias tables, one a block or one shared, with three rows for the class token.

transformers resizes the table bilinearly inside every forward (as MiDaS does) and swaps height and width of
a non-square native grid. Here it is resized once, the same way, and the class token's rows are kept.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from vit_export.artifacts import Positions, Size
from vit_export.models.config import AdaptConfig, PosEmbedMode
from vit_export.models.geometry import Geometry, show
from vit_export.models.hf_resize import HfTable
from vit_export.models.positions import Table, resample_image
from vit_export.models.resizers import Resizer
from vit_export.models.windows import relative_index

_LIKE_TRANSFORMERS = AdaptConfig(mode=PosEmbedMode.BILINEAR, antialias=False)
_CLASS_ROWS = 3  # class to token, token to class, class to class


class HfBeit(Resizer):
    """BeitModel."""

    module: Any
    positions = Positions.RELATIVE

    def scheme(self) -> Positions:
        return Positions.RELATIVE if self._biases() else Positions.ABSOLUTE

    def geometry(self) -> Geometry:
        return self._embeddings().geometry()

    def tables(self) -> tuple[Table, ...]:
        tables = self._embeddings().tables()
        return tuple(Table(f"embeddings.{t.name}", t.grid, t.prefix) for t in tables)

    def prepare(self) -> None:
        self._embeddings().prepare()
        for bias in self._biases():
            bias.forward = MethodType(_bias, bias)
            _set_index(bias)

    def _resize(self, size: Size, config: AdaptConfig) -> tuple[str, ...]:
        geometry = self.geometry()
        old, new = geometry.grid(geometry.size), geometry.grid(size)
        notes = self._embeddings()._resize(size, config)
        for bias in self._biases():
            resized = _resize_table(bias.relative_position_bias_table, old, new)
            bias.relative_position_bias_table = nn.Parameter(resized, requires_grad=False)
            bias.window_size = new
            bias.num_relative_distance = len(resized)
            _set_index(bias)
        count = len(self._biases())
        said = f"{count} relative position tables resized from {show(old)} to {show(new)}"
        return (*notes, said) if count else notes

    def _embeddings(self) -> HfTable:
        return HfTable(self.module.embeddings)

    def _biases(self) -> list[Any]:
        return [m for m in self.module.modules() if type(m).__name__.endswith("RelativePositionBias")]


def _resize_table(table: Tensor, old: Size, new: Size) -> Tensor:
    """[(2H-1)(2W-1) + 3, heads] for an old grid to the new one, class rows kept."""
    rows, columns = 2 * old[0] - 1, 2 * old[1] - 1
    image = table[:-_CLASS_ROWS].reshape(rows, columns, -1).permute(2, 0, 1)[None]
    resized = resample_image(image, (2 * new[0] - 1, 2 * new[1] - 1), _LIKE_TRANSFORMERS)
    return torch.cat([resized[0].flatten(1).T, table[-_CLASS_ROWS:]]).contiguous()


def _set_index(bias: Any) -> None:
    """Row of the table for each pair of tokens, class token first: int64 [(1 + H*W)^2]."""
    grid, rows = bias.window_size, bias.relative_position_bias_table.shape[0]
    index = nn.functional.pad(relative_index(grid, grid), (1, 0, 1, 0))
    index[0, :], index[:, 0], index[0, 0] = rows - 3, rows - 2, rows - 1
    bias.register_buffer("relative_position_index", index.flatten(), persistent=False)


def _bias(
    self: Any, window_size: Any, interpolate_pos_encoding: bool = False, dim_size: Any = None
) -> Tensor:
    """[1, heads, 1 + H*W, 1 + H*W] from the resized table."""
    tokens = 1 + self.window_size[0] * self.window_size[1]
    bias: Tensor = self.relative_position_bias_table[self.relative_position_index]
    return bias.view(tokens, tokens, -1).permute(2, 0, 1).contiguous()[None]
