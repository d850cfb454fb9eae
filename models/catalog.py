"""What can be loaded, without making any model: for `vit-export models`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch

import timm
import torch
from torchvision import models as torchvision_models

from vit_export.artifacts import Positions, Size
from vit_export.data import digits_vit_config
from vit_export.errors import UsageError
from vit_export.models import load, resizers
from vit_export.models.config import LoadOptions
from vit_export.models.resizers import Resizer
from vit_export.models.torchvision_source import preprocessing_of

# timm module → how positions are encoded, and the step of image sizes where the name does not tell it.
_TIMM: Mapping[str, tuple[Positions, int | None]] = {
    "vision_transformer": (Positions.ABSOLUTE, None),
    "deit": (Positions.ABSOLUTE, None),
    "vision_transformer_relpos": (Positions.RELATIVE, None),
    "beit": (Positions.RELATIVE, None),
    "eva": (Positions.ROTARY, None),
    "swin_transformer": (Positions.RELATIVE, 32),
    "swin_transformer_v2": (Positions.RELATIVE, 32),
    "pvt_v2": (Positions.NONE, 32),
}
# transformers model type → how positions are encoded; sizes are in each folder's config.json.
_HF: Mapping[str, Positions] = {
    "vit": Positions.ABSOLUTE,
    "deit": Positions.ABSOLUTE,
    "vit_mae": Positions.ABSOLUTE,
    "vit_msn": Positions.ABSOLUTE,
    "dinov2": Positions.ABSOLUTE,
    "dinov2_with_registers": Positions.ABSOLUTE,
    "dinov3_vit": Positions.ROTARY,
    "beit": Positions.RELATIVE,
    "swin": Positions.RELATIVE,
    "swinv2": Positions.RELATIVE,
    "pvt": Positions.ABSOLUTE,
    "pvt_v2": Positions.NONE,
}
_PATCH = re.compile(r"patch_?(\d+)")


@dataclass(frozen=True, slots=True)
class ModelRow:
    """One line of `vit-export models`; None where only the model itself tells (see `describe`).

    size: native (height, width). multiple: sides must be a multiple of it. rule: what other sizes must be
    and why, in words, where the model was asked.
    """

    spec: str
    size: Size | None
    multiple: Size | None
    positions: Positions
    rule: str = ""


def available(pattern: str | None = None) -> list[ModelRow]:
    """Everything that can be named, or what matches a glob or part of a name; no model is made.

    A model outside this list may still load: `timm:NAME` and `torchvision:NAME` take any, and a folder
    or a file of yours is not listed.
    """
    rows = (row for source in (_digits, _timm, _torchvision, _hf) for row in source())
    if pattern is None:
        return list(rows)
    glob = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    return [row for row in rows if fnmatch(row.spec, glob) or fnmatch(row.spec.partition(":")[2], glob)]


def describe(spec: str) -> ModelRow:
    """The row of one model, asked of the model itself; timm's is made without memory for its weights."""
    name = spec.removeprefix("timm:")
    if name == spec:
        model = load(spec, LoadOptions())
        return _row(spec, resizers.find(model.module, model.source_image_size))
    if not timm.is_model(name):
        raise UsageError(f"timm has no model {name!r}", "vit-export models PATTERN lists them")
    with torch.device("meta"):
        size = timm.get_pretrained_cfg(name).input_size[1:]
        resizer = resizers.find(timm.create_model(name, pretrained=False), tuple(size))
        return _row(spec, resizer)


def _row(spec: str, resizer: Resizer) -> ModelRow:
    geometry = resizer.geometry()
    return ModelRow(spec, geometry.size, geometry.multiple, resizer.scheme(), geometry.rule())


def _digits() -> Iterator[ModelRow]:
    facts = digits_vit_config()
    height, width = facts["preprocessing"]["size"]
    step = facts["timm_kwargs"]["patch_size"]
    yield ModelRow("digits-vit", (height, width), (step, step), Positions.ABSOLUTE)


def _timm() -> Iterator[ModelRow]:
    for module, (positions, step) in _TIMM.items():
        for name in timm.list_models(module=module):
            patch = _PATCH.search(name)
            side = step or (int(patch[1]) if patch else None)
            size = timm.get_pretrained_cfg(name).input_size[1:]
            yield ModelRow(f"timm:{name}", tuple(size), (side, side) if side else None, positions)


def _torchvision() -> Iterator[ModelRow]:
    for name in torchvision_models.list_models(module=torchvision_models, include=["vit_*", "swin_*"]):
        size = preprocessing_of(torchvision_models.get_model_weights(name).DEFAULT).size
        vit = name.startswith("vit_")
        step = int(name.rsplit("_", 1)[1]) if vit else 32
        scheme = Positions.ABSOLUTE if vit else Positions.RELATIVE
        yield ModelRow(f"torchvision:{name}", size, (step, step), scheme)


def _hf() -> Iterator[ModelRow]:
    for kind, positions in _HF.items():
        yield ModelRow(f"hf:DIR_OR_ID ({kind})", None, None, positions)
