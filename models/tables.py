"""Position tables of a checkpoint made at another resolution, resampled to the grid of the model."""

from __future__ import annotations

import warnings
from math import isqrt

from timm.layers import resize_rel_pos_bias_table
from torch import Tensor, nn

from vit_export.models import resizers
from vit_export.models.geometry import show
from vit_export.models.positions import Table, resample_positions, square

# Computed from the window or grid, not learned: the module's own are right, a checkpoint's are not needed.
COMPUTED = ("relative_position_index", "relative_coords_table", "attn_mask", "position_ids")
_RELATIVE = "relative_position_bias_table"


def fit(module: nn.Module, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """`state` with its position tables at the module's grid, and what was resampled.

    Tables that cannot be understood are left for the caller's strict check.
    """
    own = module.state_dict()
    fitted = {k: v for k, v in state.items() if k.rsplit(".", 1)[-1] not in COMPUTED}
    fitted |= {k: v for k, v in own.items() if k.rsplit(".", 1)[-1] in COMPUTED}
    different = [k for k, v in fitted.items() if k in own and own[k].shape != v.shape]
    notes: list[str] = []
    known = _absolute(module) if any(not k.endswith(_RELATIVE) for k in different) else {}
    for name in different:
        if name.endswith(_RELATIVE):
            fitted[name] = _relative(fitted[name], own[name])
            notes.append(f"checkpoint: {name} resampled from {len(state[name])} to {len(own[name])} rows")
        elif name in known:
            table = known[name]
            old = square(state[name].shape[1] - table.prefix)
            if old is not None and state[name].shape[2] == own[name].shape[2]:
                fitted[name] = resample_positions(state[name], old, table.grid, table.prefix)
                notes.append(f"checkpoint: {name} resampled from {show(old)} to {show(table.grid)}")
    return fitted, tuple(notes)


def _absolute(module: nn.Module) -> dict[str, Table]:
    """The module's learned tables by their full parameter names."""
    paths = {id(child): path for path, child in module.named_modules()}
    found: dict[str, Table] = {}
    for part in resizers.parts(module):
        path = paths[id(part.module)]
        found |= {f"{path}.{t.name}" if path else t.name: t for t in part.tables()}
    return found


def _relative(table: Tensor, own: Tensor) -> Tensor:
    """A square window's bias table [(2w-1)^2 (+3 class entries), heads] at the model's window."""
    if table.shape[1:] != own.shape[1:] or isqrt(len(own)) ** 2 not in (len(own), len(own) - 3):
        return table
    window = (isqrt(len(own)) + 1) // 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's, about timm's interpolation
        resized: Tensor = resize_rel_pos_bias_table(table, (window, window), tuple(own.shape))
    return resized
