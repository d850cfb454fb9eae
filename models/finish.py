"""What every source does last: eval mode, checks, one output, positions as constants, preprocessing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vit_export.artifacts import LoadedModel, Preprocessing, Size
from vit_export.errors import NumericsError, UsageError
from vit_export.models import resizers
from vit_export.models.config import AdaptConfig, LoadOptions
from vit_export.models.output import Choice, select_output

RANDOM_WEIGHTS = "random weights: neither --pretrained nor --checkpoint was given"


def finish(
    module: nn.Module,
    *,
    family: str,
    preprocessing: Preprocessing,
    options: LoadOptions,
    size: Size | None = None,
    num_classes: int | None = None,
    batch: int = 2,
    notes: tuple[str, ...] = (),
) -> LoadedModel:
    """Make a loaded module a LoadedModel.

    size: what the module takes, where the source knows it; the module's own statement wins. It replaces
    preprocessing.size.
    batch: the batch the module takes, where its code fixes it.
    num_classes: where the source knows it (0: no classifier); None to conclude it from the output.

    Raises NumericsError on NaN or Inf weights, InputError when forward gives no usable output.
    """
    if module.training:
        module.eval()
    module.requires_grad_(False)
    if not all(p.dtype is torch.float32 for p in module.parameters()):
        module.float()
    check_finite(module)
    config = AdaptConfig(pos_embed=options.pos_embed, prefix_tokens=options.prefix_tokens)
    resizer = resizers.find(module, size, config, options.image_size)
    resizer.prepare()
    geometry = resizer.geometry()
    choice = select_output(module, geometry.size, batch)
    return LoadedModel(
        module=module,
        spec="",
        family=family,
        preprocessing=override(preprocessing.at(geometry.size), options),
        num_classes=_classes(module, choice) if num_classes is None else num_classes,
        source_image_size=geometry.size,
        multiple=geometry.multiple,
        positions=resizer.scheme(),
        output=choice.words,
        notes=notes,
    )


def assumed(options: LoadOptions) -> tuple[Preprocessing, tuple[str, ...]]:
    """ImageNet's statistics for a model that does not say how its images are prepared, and a note on it."""
    preprocessing = Preprocessing(size=(224, 224), crop_pct=0.875)
    if options.mean is not None and options.std is not None:
        return preprocessing, ()
    return preprocessing, (
        "preprocessing assumed: ImageNet mean and std, bicubic; --mean, --std, ... change it",
    )


def override(preprocessing: Preprocessing, options: LoadOptions) -> Preprocessing:
    """The preprocessing with the user's --mean, --std, --interpolation and --crop-pct."""
    given: dict[str, Any] = {
        "mean": options.mean,
        "std": options.std,
        "interpolation": options.interpolation,
        "crop_pct": options.crop_pct,
    }
    if options.std is not None and min(options.std) <= 0:
        raise UsageError(
            f"--std {options.std} must be above 0", "give one value per RGB channel, on the 0..1 scale"
        )
    return replace(preprocessing, **{k: v for k, v in given.items() if v is not None})


def check_finite(module: nn.Module) -> None:
    """Raise NumericsError naming the first parameter or buffer with NaN, or parameter with Inf."""
    for name, parameter in module.named_parameters():
        _require(torch.isfinite(parameter), name, parameter)
    for name, tensor in module.named_buffers():
        if tensor.is_floating_point():  # masks may hold -inf
            _require(~torch.isnan(tensor), name, tensor)


def _require(good: Tensor, name: str, tensor: Tensor) -> None:
    bad = good.numel() - int(good.sum())
    if bad:
        kind = "NaN" if bool(torch.isnan(tensor).any()) else "Inf"
        raise NumericsError(f"{name} holds {bad} {kind} in {good.numel()} values", "the weights are broken")


def _classes(module: nn.Module, choice: Choice) -> int:
    """K when the output comes from a classifier, else 0."""
    declared = getattr(module, "num_classes", None)
    return choice.width if choice.scores or declared == choice.width else 0
