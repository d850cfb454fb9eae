"""A user's own module: its position table is found by shape against the patch embedding.

The patch embedding is the first convolution on 3 channels. A table is a float parameter or buffer as wide
as the embedding whose rows are a few prefix tokens and one row a patch. The number of patches follows from
the image size where the module says it (`img_size`, `image_size`, ...); otherwise from --image-size, where
a table fits it and the module takes it; otherwise the grid is taken to be square, and where several
readings remain the module is run to see which image size it takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vit_export.artifacts import Positions, Size
from vit_export.errors import AmbiguousPositions, InputError, UsageError
from vit_export.models.config import AdaptConfig
from vit_export.models.geometry import Geometry, show
from vit_export.models.output import run
from vit_export.models.positions import Table, resample_positions, square
from vit_export.models.resizers import Resizer

SIZE_NAMES = ("img_size", "image_size", "input_size")
_GRID_NAMES = ("grid_size", "patches_resolution", "patch_grid")
_MOST_PREFIX = 5  # class + distillation, or class + 4 registers
_DEFAULT: Size = (224, 224)


class PlainModule(Resizer):
    """Finds and resamples the position table of a module that no library knows.

    size: the image size where the caller knows it. hint: the size to try where nobody does.
    config.pos_embed and config.prefix_tokens: the user's.
    """

    positions = Positions.ABSOLUTE

    def __init__(
        self, module: nn.Module, size: Size | None, config: AdaptConfig, hint: Size | None = None
    ) -> None:
        super().__init__(module, size or declared_size(module))
        self._config = config
        self._hint = hint
        self._patch = _patch_embedding(module)

    def scheme(self) -> Positions:
        return Positions.ABSOLUTE if self._readings() else Positions.NONE

    def geometry(self) -> Geometry:
        step = self._step()
        reason = f"patch embedding with stride {show(step)}" if self._patch is not None else ""
        return Geometry(self._image_size(), step, reason=reason)

    def tables(self) -> tuple[Table, ...]:
        """The one table, or none.

        Raises AmbiguousPositions listing the candidates, UsageError when the flags fit no parameter.
        """
        grid = self._grid(self._image_size())
        found = [t for t in self._readings() if t.grid == grid]
        if len(found) > 1:
            raise self._ambiguous(found)
        return tuple(found)

    def _resize(self, size: Size, config: AdaptConfig) -> tuple[str, ...]:
        old, notes = self._image_size(), []
        for table in self.tables():
            new = self._grid(size)
            before = _get(self.module, table.name)
            rows = before.reshape(1, *before.shape[-2:])
            after = resample_positions(rows, table.grid, new, table.prefix, config)
            _set(self.module, table.name, after.reshape(*before.shape[:-2], *after.shape[-2:]))
            _extend_ids(self.module, before.shape[-2], after.shape[-2])
            split = f"{_counted(table.prefix, 'prefix token')} + {show(table.grid)}"
            notes.append(f"{table.name} taken for the positions ({split}), resampled to {show(new)}")
        _tell(self.module, SIZE_NAMES, old, size)
        _tell(self.module, _GRID_NAMES, self._grid(old), self._grid(size))
        return tuple(notes) or ("no position table found by shape, none resampled",)

    def _image_size(self) -> Size:
        """The known size, else the one that a table implies and the module takes."""
        if self._size is None:
            self._size = self._implied_size()
        return self._size

    def _implied_size(self) -> Size:
        if self._hint is not None and self._fits(self._hint):
            return self._hint
        step, readings = self._step(), self._readings()
        sizes = sorted({(t.grid[0] * step[0], t.grid[1] * step[1]) for t in readings})
        if len(sizes) > 1:
            sizes = [size for size in sizes if _takes(self.module, size)] or sizes
        if len(sizes) > 1:
            raise self._ambiguous(readings)
        return sizes[0] if sizes else self._guess()

    def _fits(self, size: Size) -> bool:
        """Whether a table is made for the grid of `size`, and the module takes it."""
        grid = self._grid(size)
        made = any(_prefix(tensor.shape[-2], grid) is not None for _, tensor in self._tensors())
        return made and _takes(self.module, size)

    def _guess(self) -> Size:
        """The hint or 224x224 for a module without a table. Raises InputError where it takes neither."""
        if self._hint is not None and _takes(self.module, self._hint):
            return self._hint
        try:
            run(self.module, _DEFAULT)
        except InputError as error:
            raise InputError(
                f"{type(self.module).__name__} does not state its image size; {error.message}",
                "give the size it was made for: --image-size HxW, or `img_size` on the module",
            ) from error
        return _DEFAULT

    def _readings(self) -> list[Table]:
        """Every way to read a tensor as a position table that the flags allow; names with `pos` first."""
        wanted, prefix = self._config.pos_embed, self._config.prefix_tokens
        found = [t for name, tensor in self._tensors() for t in self._split(name, tensor.shape[-2])]
        found = [t for t in found if wanted in (None, t.name) and prefix in (None, t.prefix)]
        if not found and (wanted, prefix) != (None, None):
            raise self._no_table()
        return [t for t in found if "pos" in t.name.lower()] or found

    def _split(self, name: str, rows: int) -> list[Table]:
        most = max(_MOST_PREFIX, self._config.prefix_tokens or 0)
        if self._size is not None:
            grid = self._grid(self._size)
            prefix = _prefix(rows, grid, most)
            return [] if prefix is None else [Table(name, grid, prefix)]
        splits = ((p, square(rows - p)) for p in range(min(most, rows - 1) + 1))
        return [Table(name, grid, prefix) for prefix, grid in splits if grid is not None]

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Float tensors [N, C] or [1, N, C] with the embedding's C that are not the weights of a layer."""
        if self._patch is None:
            return
        for path, owner in self.module.named_modules():
            library = type(owner).__module__.startswith("torch.nn") and not isinstance(owner, nn.Embedding)
            if library:
                continue
            own = (*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False))
            for name, tensor in own:
                wide = tensor.ndim in (2, 3) and tensor.shape[-1] == self._patch.out_channels
                if wide and tensor.is_floating_point() and tensor.shape[:-2] in ((), (1,)):
                    yield f"{path}.{name}" if path else name, tensor

    def _step(self) -> Size:
        if self._patch is None:
            return (1, 1)
        return int(self._patch.stride[0]), int(self._patch.stride[1])

    def _grid(self, size: Size) -> Size:
        step = self._step()
        return size[0] // step[0], size[1] // step[1]

    def _no_table(self) -> UsageError:
        """The flags fit no tensor: what they ask for, and what there is."""
        name, prefix = self._config.pos_embed, self._config.prefix_tokens
        named = "" if name is None else f" --pos-embed {name}"
        named += "" if prefix is None else f" --prefix-tokens {prefix}"
        split = f"up to {_MOST_PREFIX} prefix tokens" if prefix is None else _counted(prefix, "prefix token")
        grid = "a square grid" if self._size is None else show(self._grid(self._size))
        there = ", ".join(f"{path} ({_counted(tensor.shape[-2], 'row')})" for path, tensor in self._tensors())
        return UsageError(
            f"{named.strip()}: {type(self.module).__name__} has no such table of {split} + {grid}",
            f"tensors as wide as the patch embedding: {there or 'none'}",
        )

    def _ambiguous(self, found: list[Table]) -> AmbiguousPositions:
        listed = "; ".join(f"{t.name} = {_counted(t.prefix, 'prefix token')} + {show(t.grid)}" for t in found)
        return AmbiguousPositions(
            f"the position table of {type(self.module).__name__} could be: {listed}",
            "say which: --pos-embed NAME --prefix-tokens N",
        )


def _counted(count: int, thing: str) -> str:
    return f"{count} {thing}{'' if count == 1 else 's'}"


def _prefix(rows: int, grid: Size, most: int = _MOST_PREFIX) -> int | None:
    """Prefix tokens of a table of that many rows made for `grid`, None where it is not."""
    prefix = rows - grid[0] * grid[1]
    return prefix if 0 <= prefix <= most else None


def declared_size(module: nn.Module) -> Size | None:
    """The image size a module or its parts state: `img_size`, `image_size`, ... or a timm/HF config."""
    for part in module.modules():
        configs = (part, getattr(part, "config", None))
        for value in (getattr(c, name, None) for c in configs for name in SIZE_NAMES):
            size = _as_size(value)
            if size is not None:
                return size
    return None


def _as_size(value: Any) -> Size | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return (value, value)
    if isinstance(value, tuple | list) and all(isinstance(v, int) for v in value) and len(value) in (2, 3):
        return (value[-2], value[-1])
    return None


def _patch_embedding(module: nn.Module) -> nn.Conv2d | None:
    """The first convolution on RGB with a stride."""
    convs = (m for m in module.modules() if isinstance(m, nn.Conv2d))
    return next((c for c in convs if c.in_channels == 3 and max(c.stride) > 1), None)


def _takes(module: nn.Module, size: Size) -> bool:
    try:
        run(module, size)
    except InputError:
        return False
    return True


def _get(module: nn.Module, name: str) -> Tensor:
    tensor: Tensor = getattr(module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])
    return tensor


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    path, _, attribute = name.rpartition(".")
    owner = module.get_submodule(path)
    if attribute in owner._parameters:
        setattr(owner, attribute, nn.Parameter(value.detach(), requires_grad=False))
    else:
        owner._buffers[attribute] = value.detach()


def _extend_ids(module: nn.Module, old: int, new: int) -> None:
    """Index buffers 0..old-1 that look a table up (CLIP's position_ids) become 0..new-1."""
    for owner in module.modules():
        for name, ids in owner.named_buffers(recurse=False):
            if not ids.is_floating_point() and torch.equal(ids.flatten(), torch.arange(old)):
                owner._buffers[name] = torch.arange(new, dtype=ids.dtype).reshape(*ids.shape[:-1], new)
        if isinstance(owner, nn.Embedding) and owner.weight.shape[0] == new:
            owner.num_embeddings = new


def _tell(module: nn.Module, names: tuple[str, ...], old: Size, new: Size) -> None:
    """Attributes that state the old size or grid state the new one, as int, tuple or list."""
    for part in module.modules():
        for name in names:
            value = part.__dict__.get(name)
            if value is None or _as_size(value) != old:
                continue
            if isinstance(value, int):
                setattr(part, name, new[0] if new[0] == new[1] else new)
            else:
                setattr(part, name, type(value)((*value[:-2], *new)))
        if part.__dict__.get("num_patches") == old[0] * old[1] and names is _GRID_NAMES:
            part.__dict__["num_patches"] = new[0] * new[1]
