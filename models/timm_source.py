"""`timm:NAME`: any model of timm, with its own data config."""

from __future__ import annotations

from typing import Any

import timm
from timm.data import resolve_model_data_config
from torch import nn

from vit_export.artifacts import CropMode, Interpolation, LoadedModel, Preprocessing
from vit_export.errors import UsageError
from vit_export.models.checkpoint import load_checkpoint
from vit_export.models.config import LoadOptions
from vit_export.models.download import downloading
from vit_export.models.finish import RANDOM_WEIGHTS, finish


def load(name: str, options: LoadOptions) -> LoadedModel:
    """Create the model, with random, downloaded (--pretrained) or given (--checkpoint) weights.

    Raises UsageError for an unknown name, InputError when weights cannot be downloaded,
    CheckpointError when the checkpoint does not fit.
    """
    if not timm.is_model(name):
        raise UsageError(f"timm has no model {name!r}", _closest(name))
    if options.pretrained and options.checkpoint:
        raise UsageError("--pretrained and --checkpoint are two sets of weights", "give one of them")
    classes = {} if options.num_classes is None else {"num_classes": options.num_classes}
    with downloading(f"the weights of timm:{name}", options.pretrained):
        module = timm.create_model(name, pretrained=options.pretrained, **classes)
    notes = load_checkpoint(module, options.checkpoint) if options.checkpoint else _origin(module, options)
    preprocessing = preprocessing_of(module)
    return finish(
        module,
        family=type(module).__module__.rsplit(".", 1)[-1],
        preprocessing=preprocessing,
        options=options,
        size=preprocessing.size,
        num_classes=getattr(module, "num_classes", None),
        notes=notes,
    )


def preprocessing_of(module: nn.Module) -> Preprocessing:
    """timm's data config of a model as our contract."""
    data: dict[str, Any] = resolve_model_data_config(module)
    return Preprocessing(
        size=tuple(data["input_size"][1:]),
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        interpolation=Interpolation(data["interpolation"]),
        crop_pct=float(data["crop_pct"]),
        crop_mode=CropMode.SQUASH if data["crop_mode"] == "squash" else CropMode.CENTER,
    )


def _origin(module: nn.Module, options: LoadOptions) -> tuple[str, ...]:
    if not options.pretrained:
        return (RANDOM_WEIGHTS,)
    native: dict[str, Any] = getattr(module, "pretrained_cfg", {})
    if options.num_classes in (None, 0, native.get("num_classes")):
        return ()
    return (f"the classifier of {options.num_classes} classes has random weights",)


def _closest(name: str) -> str:
    from difflib import get_close_matches

    names = get_close_matches(name, timm.list_models(), n=3)
    near = f"closest: {', '.join(names)}; " if names else ""
    return f"{near}vit-export models PATTERN lists them"
