"""`torchvision:NAME`: classification models of torchvision, with the transforms of their default weights."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from torch import nn
from torchvision import models

from vit_export.artifacts import Interpolation, LoadedModel, Preprocessing
from vit_export.errors import UsageError
from vit_export.models.checkpoint import load_checkpoint
from vit_export.models.config import LoadOptions
from vit_export.models.download import downloading
from vit_export.models.finish import RANDOM_WEIGHTS, finish


def load(name: str, options: LoadOptions) -> LoadedModel:
    """Create the model, with random, downloaded (--pretrained) or given (--checkpoint) weights.

    Raises UsageError for an unknown name, InputError when weights cannot be downloaded.
    """
    if name not in models.list_models(module=models):
        near = get_close_matches(name, models.list_models(module=models), n=3)
        closest = f"closest: {', '.join(near)}" if near else "vit-export models torchvision lists them"
        raise UsageError(f"torchvision has no classification model {name!r}", closest)
    if options.pretrained and options.checkpoint:
        raise UsageError("--pretrained and --checkpoint are two sets of weights", "give one of them")
    weights = models.get_model_weights(name).DEFAULT
    with downloading(f"the weights of torchvision:{name}", options.pretrained, host="download.pytorch.org"):
        module: nn.Module = models.get_model(name, **_arguments(weights, options))
    if options.checkpoint is not None:
        notes = load_checkpoint(module, options.checkpoint)
    else:
        notes = () if options.pretrained else (RANDOM_WEIGHTS,)
    preprocessing = preprocessing_of(weights)
    return finish(
        module,
        family=type(module).__module__.rsplit(".", 1)[-1],
        preprocessing=preprocessing,
        options=options,
        size=preprocessing.size,
        num_classes=options.num_classes or len(weights.meta["categories"]),
        notes=notes,
    )


def preprocessing_of(weights: Any) -> Preprocessing:
    """The transforms of a weights entry as our contract."""
    preset = weights.transforms()
    crop, resize = preset.crop_size[0], preset.resize_size[0]
    return Preprocessing(
        size=(crop, crop),
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        interpolation=Interpolation(preset.interpolation.value),
        crop_pct=crop / resize,
    )


def _arguments(weights: Any, options: LoadOptions) -> dict[str, Any]:
    if not options.pretrained:
        classes = options.num_classes or len(weights.meta["categories"])
        return {"weights": None, "num_classes": classes}
    if options.num_classes not in (None, len(weights.meta["categories"])):
        raise UsageError(
            f"the weights have {len(weights.meta['categories'])} classes",
            "leave out --num-classes, or load your own --checkpoint without --pretrained",
        )
    return {"weights": weights}
