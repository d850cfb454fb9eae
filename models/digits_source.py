"""`digits-vit`: the model that ships with the package."""

from __future__ import annotations

from timm.models.vision_transformer import VisionTransformer

from vit_export.artifacts import Interpolation, LoadedModel, Preprocessing
from vit_export.data import DIGITS_VIT_WEIGHTS, digits_vit_config
from vit_export.errors import UsageError
from vit_export.models.checkpoint import load_checkpoint
from vit_export.models.config import LoadOptions
from vit_export.models.finish import finish


def load(name: str, options: LoadOptions) -> LoadedModel:
    """The trained digits model; `name` is empty. --checkpoint loads other weights of its shape."""
    if options.num_classes not in (None, 10):
        raise UsageError("digits-vit has 10 classes", "leave out --num-classes")
    facts = digits_vit_config()
    module = VisionTransformer(**facts["timm_kwargs"])
    notes = load_checkpoint(module, options.checkpoint or DIGITS_VIT_WEIGHTS)
    given = facts["preprocessing"]
    preprocessing = Preprocessing(
        size=tuple(given["size"]),
        mean=tuple(given["mean"]),
        std=tuple(given["std"]),
        interpolation=Interpolation(given["interpolation"]),
        crop_pct=given["crop_pct"],
    )
    return finish(
        module,
        family="vision_transformer",
        preprocessing=preprocessing,
        options=options,
        num_classes=10,
        notes=notes,
    )
