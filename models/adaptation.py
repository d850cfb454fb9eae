"""A loaded model at another image size."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace

import torch
from torch import nn

from vit_export.artifacts import LoadedModel, Size
from vit_export.errors import BadSize, InputError, NumericsError
from vit_export.models import resizers
from vit_export.models.config import AdaptConfig
from vit_export.models.geometry import show
from vit_export.models.output import run


def adapt(model: LoadedModel, size: Size, config: AdaptConfig | None = None) -> LoadedModel:
    """The model for images of `size` (height, width): position tables resampled, windows and masks redone.

    The input is not changed. The present size gives the same module back. The adapted module is run
    once, so a model that cannot work at `size` fails here.

    Raises BadSize naming the nearest valid sizes, AmbiguousPositions when a user's own module has
    several tables that fit.
    """
    if size == model.image_size:
        return model
    config = config or AdaptConfig()
    resizers.find(model.module, model.image_size, config).geometry().check(size, model.spec)
    module = _copied(model.module)
    try:
        notes = resizers.find(module, model.image_size, config).resize(size, config, model.spec)
        output = run(module, size, batch=1)
    except InputError as error:
        raise _unfit(model, size, error.message) from error
    except (AssertionError, ValueError, RuntimeError) as error:  # a library's own check of the size
        raise _unfit(model, size, str(error) or type(error).__name__) from error
    if not torch.isfinite(output).all():
        raise NumericsError(f"{model.spec} gives NaN or Inf at {show(size)}")
    return replace(
        model,
        module=module,
        preprocessing=model.preprocessing.at(size),
        notes=(*model.notes, *notes),
    )


def adapt_all(
    model: LoadedModel, sizes: Sequence[Size], config: AdaptConfig | None = None
) -> list[LoadedModel]:
    """The model at each of the sizes, before anything else is done with one of them.

    Raises BadSize naming every size that does not fit.
    """
    adapted, refused = [], []
    for size in sizes:
        try:
            adapted.append(adapt(model, size, config))
        except BadSize as error:
            refused.append(error)
    if refused:
        raise BadSize.together(refused)
    return adapted


def _copied(module: nn.Module) -> nn.Module:
    """A copy over the same weights of linears and convolutions, which no resizer touches: most of a model
    is held once however many sizes it is adapted to."""
    shared = [part.weight for part in module.modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    return deepcopy(module, {id(weight): weight for weight in shared})


def _unfit(model: LoadedModel, size: Size, reason: str) -> BadSize:
    """The model's code refuses a size that its geometry allows: only its own is known to work."""
    line = reason.strip().splitlines()[0]
    return BadSize([show(size)], model.spec, f"{line}; its own {show(model.source_image_size)} works", [])
