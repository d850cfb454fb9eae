"""Loading a Vision Transformer from anywhere, and giving it another image size.

    model = load("timm:deit_tiny_patch16_224", LoadOptions(pretrained=True))
    small = adapt(model, (160, 192))

Importing this package imports no torch; the functions do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from vit_export.artifacts import LoadedModel, Size
from vit_export.errors import MissingExtra, UsageError
from vit_export.models.config import AdaptConfig, LoadOptions, PosEmbedMode

if TYPE_CHECKING:
    from vit_export.models.catalog import ModelRow

__all__ = [
    "AdaptConfig",
    "LoadOptions",
    "PosEmbedMode",
    "adapt",
    "adapt_all",
    "available",
    "describe",
    "load",
]

# What a SPEC starts or ends with → the module whose `load(name, options)` reads it.
PREFIXES: Mapping[str, str] = {
    "timm:": "timm_source",
    "hf:": "hf_source",
    "torchvision:": "torchvision_source",
}
SUFFIXES: Mapping[str, str] = {".onnx": "onnx_source", ".pt2": "program_source", ".py": "file_source"}
DEFAULT = "digits-vit"
_FORMS = (
    "digits-vit, timm:NAME, hf:DIR_OR_ID, torchvision:NAME, path/file.py:FACTORY, model.onnx, program.pt2"
)


def load(spec: str = DEFAULT, options: LoadOptions | None = None) -> LoadedModel:
    """The model a SPEC names, in eval mode, float32, with one [N, K] output.

    Raises UsageError for a SPEC or name that does not exist, InputError for files that cannot be read,
    CheckpointError, NumericsError for NaN or Inf weights, MissingExtra without the `export` extra.
    """
    source, name = _source(spec)
    loader: Callable[[str, LoadOptions], LoadedModel] = _module(source).load
    return replace(loader(name, options or LoadOptions()), spec=spec)


def adapt(model: LoadedModel, size: Size, config: AdaptConfig | None = None) -> LoadedModel:
    """The model for another image size (height, width); see `models.adaptation`."""
    adapted: LoadedModel = _module("adaptation").adapt(model, size, config)
    return adapted


def adapt_all(
    model: LoadedModel, sizes: Sequence[Size], config: AdaptConfig | None = None
) -> list[LoadedModel]:
    """The model for each of several image sizes; see `models.adaptation`."""
    adapted: list[LoadedModel] = _module("adaptation").adapt_all(model, sizes, config)
    return adapted


def available(pattern: str | None = None) -> list[ModelRow]:
    """What can be named as a SPEC, all or what matches a glob or part of a name; see `models.catalog`."""
    rows: list[ModelRow] = _module("catalog").available(pattern)
    return rows


def describe(spec: str) -> ModelRow:
    """Native size, size step and rule, and position scheme of one model; see `models.catalog`."""
    row: ModelRow = _module("catalog").describe(spec)
    return row


def _source(spec: str) -> tuple[str, str]:
    """(module, name) of a SPEC."""
    if spec == DEFAULT:
        return "digits_source", ""
    for prefix, source in PREFIXES.items():
        if spec.startswith(prefix):
            return source, spec.removeprefix(prefix)
    path = spec.rpartition(":")[0] if ".py:" in spec else spec
    source = SUFFIXES.get(PurePath(path).suffix, "")
    if not source or (source == "file_source" and path == spec):
        raise UsageError(f"--model {spec} is no SPEC", f"one of: {_FORMS}")
    return source, spec


def _module(name: str) -> Any:
    """A module of this package, imported now; MissingExtra where what it needs is not installed."""
    try:
        return import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        raise MissingExtra((error.name or name).partition(".")[0], "export") from error
