"""Resampling a position table: exact where nothing changes, timm's numbers where something does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from vit_export.artifacts import Size
from vit_export.errors import AmbiguousPositions
from vit_export.models import AdaptConfig, PosEmbedMode
from vit_export.models.positions import resample_positions, square
from vit_export.models.windows import relative_index

grids = st.tuples(st.integers(2, 9), st.integers(2, 9))
prefixes = st.integers(0, 5)
configs = st.builds(AdaptConfig, mode=st.sampled_from(PosEmbedMode), antialias=st.booleans())
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


def table(grid: Size, prefix: int, width: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, prefix + grid[0] * grid[1], width, generator=generator).to(dtype)


@given(grids, prefixes, configs, dtypes)
def test_the_same_grid_is_identity(grid: Size, prefix: int, config: AdaptConfig, dtype: torch.dtype) -> None:
    """Any grid, square or not, asked for itself comes back bit for bit (timm's early return misses some)."""
    source = table(grid, prefix, dtype=dtype)
    assert torch.equal(resample_positions(source, grid, grid, prefix, config), source)


@given(grids, grids, prefixes, configs, dtypes)
def test_prefix_and_dtype_are_kept(
    grid: Size, new: Size, prefix: int, config: AdaptConfig, dtype: torch.dtype
) -> None:
    """Class, distillation and register rows are copied; shape and dtype are what was asked for."""
    source = table(grid, prefix, dtype=dtype)
    result = resample_positions(source, grid, new, prefix, config)
    assert result.dtype is dtype
    assert result.shape == (1, prefix + new[0] * new[1], 4)
    assert torch.equal(result[:, :prefix], source[:, :prefix])


@given(grids, grids, prefixes, configs, st.floats(-5, 5, width=32))
def test_a_constant_table_stays_constant(
    grid: Size, new: Size, prefix: int, config: AdaptConfig, value: float
) -> None:
    """Every method's weights sum to one, also at the borders."""
    source = torch.full((1, prefix + grid[0] * grid[1], 3), value)
    result = resample_positions(source, grid, new, prefix, config)
    assert torch.allclose(result, torch.full_like(result, value), atol=1e-5, rtol=1e-5)


@given(grids, grids, prefixes, st.sampled_from(["bicubic", "bilinear"]), st.booleans())
def test_agrees_with_timm(grid: Size, new: Size, prefix: int, mode: str, antialias: bool) -> None:
    """The same numbers as timm.layers.resample_abs_pos_embed at the same settings."""
    source = table(grid, prefix)
    config = AdaptConfig(mode=PosEmbedMode(mode), antialias=antialias)
    ours = resample_positions(source, grid, new, prefix, config)
    theirs = resample_abs_pos_embed(
        source, list(new), list(grid), num_prefix_tokens=prefix, interpolation=mode, antialias=antialias
    )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("mode", PosEmbedMode)
def test_there_and_back(mode: PosEmbedMode) -> None:
    """A smooth table enlarged twofold and reduced again is itself within 5 % of its range."""
    y, x = torch.meshgrid(torch.linspace(0, 1, 14), torch.linspace(0, 1, 10), indexing="ij")
    smooth = torch.stack([y, x, torch.sin(3 * y + x), torch.cos(2 * x)], -1).reshape(1, 140, 4)
    config = AdaptConfig(mode=mode)
    large = resample_positions(smooth, (14, 10), (28, 20), 0, config)
    back = resample_positions(large, (28, 20), (14, 10), 0, config)
    assert (back - smooth).abs().max() < 0.05 * (smooth.max() - smooth.min())


def test_antialias_and_mode_change_the_numbers() -> None:
    """The settings are used: each gives another table when a grid is reduced."""
    source = table((8, 8), 1)
    modes = (PosEmbedMode.BICUBIC, PosEmbedMode.BILINEAR)
    settings = [AdaptConfig(mode=mode, antialias=antialias) for mode in modes for antialias in (True, False)]
    results = [resample_positions(source, (8, 8), (5, 5), 1, config) for config in settings]
    assert len({tuple(r.flatten().tolist()) for r in results}) == 4


def test_a_table_of_another_length_is_refused() -> None:
    """A split that does not add up names the numbers and the flag that settles it."""
    with pytest.raises(AmbiguousPositions, match=r"17 rows is not 2 prefix tokens \+ 4x4") as caught:
        resample_positions(table((4, 4), 1), (4, 4), (8, 8), 2)
    assert "--prefix-tokens" in caught.value.hint


@given(grids)
def test_window_index_matches_timm(window: Size) -> None:
    """A window in a table of its own size is indexed as timm's Swin does it."""
    from timm.models.swin_transformer import get_relative_position_index

    assert torch.equal(relative_index(window, window), get_relative_position_index(*window))


@given(grids, st.integers(0, 3), st.integers(0, 3))
def test_a_smaller_window_keeps_the_biases_of_its_offsets(window: Size, more_y: int, more_x: int) -> None:
    """Two tokens dy, dx apart read the row of dy, dx, whatever window the table was learned for."""
    made_for = (window[0] + more_y, window[1] + more_x)
    rows = relative_index(window, made_for)
    dy, dx = rows // (2 * made_for[1] - 1) - made_for[0] + 1, rows % (2 * made_for[1] - 1) - made_for[1] + 1
    tokens = torch.arange(window[0] * window[1])
    y, x = tokens // window[1], tokens % window[1]
    assert torch.equal(dy, y[:, None] - y[None, :])
    assert torch.equal(dx, x[:, None] - x[None, :])


@pytest.mark.parametrize(
    ("tokens", "grid"), [(196, (14, 14)), (1, (1, 1)), (0, None), (-3, None), (197, None)]
)
def test_square(tokens: int, grid: Size | None) -> None:
    """Only a square number of tokens is a square grid."""
    assert square(tokens) == grid
