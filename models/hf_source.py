"""`hf:DIR_OR_ID`: a transformers vision model from a local folder or the hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.utils import logging

from vit_export.artifacts import LoadedModel, Size
from vit_export.errors import CheckpointError, InputError, UntrustedInput
from vit_export.models.checkpoint import load_checkpoint, some
from vit_export.models.config import LoadOptions
from vit_export.models.download import downloading
from vit_export.models.finish import RANDOM_WEIGHTS, finish
from vit_export.models.geometry import show
from vit_export.models.hf_images import class_facts, own_side, preprocessing_of
from vit_export.models.hf_resize import pair

_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_TRAINING = ("ForPreTraining", "ForMaskedImageModeling")
_PROCESSOR = "preprocessor_config.json"
_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 3}


def load(name: str, options: LoadOptions) -> LoadedModel:
    """The model of a folder, with its weights where it has some; an id is downloaded with --pretrained.

    A folder with only a config.json gives the architecture with random weights, and says so.

    Raises InputError for a missing or unreadable folder and for failed downloads, CheckpointError when
    weights are missing, UntrustedInput when the model is code that comes with the weights.
    """
    folder = Path(name)
    local = folder.is_dir()
    if not local and not options.pretrained:
        raise InputError(
            f"no folder {name}", "a model of the Hugging Face hub is downloaded with --pretrained"
        )
    with _quiet(), downloading(f"hf:{name}", not local):
        config = _config(name, options)
        kind = _model_class(config)
        has_weights = not local or any((folder / file).is_file() for file in _WEIGHTS)
        from_weights = has_weights and options.checkpoint is None
        module, notes = (
            _with_weights(name, kind, config, options) if from_weights else (_random(kind, config), ())
        )
        processor, said = _processor(name, config)
    if options.checkpoint is not None:
        notes = load_checkpoint(module, options.checkpoint)
    elif not from_weights:
        notes = (RANDOM_WEIGHTS,)
    size = _image_size(config)
    side = own_side(processor)
    if side is not None and (side, side) != size:
        said = (
            *said,
            f"the image processor makes images of {side}x{side}, the model was made for {show(size)}",
        )
    return finish(
        module,
        family=config.model_type,
        preprocessing=preprocessing_of(processor, size),
        options=options,
        size=size,
        num_classes=None if config.num_labels else 0,  # num_labels 0 names an embedding `logits`
        notes=(*notes, *said),
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and warnings: what matters is raised or noted here."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _config(name: str, options: LoadOptions) -> Any:
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=options.trust_remote_code)
    except (ValueError, OSError, KeyError) as error:
        text = str(error)
        if "trust_remote_code" in text:
            raise UntrustedInput(
                f"hf:{name} comes with its own code", "read it, then allow it with --trust-remote-code"
            ) from error
        if not Path(name).is_dir():
            raise  # a failed download
        raise InputError(f"hf:{name} cannot be read: {text.strip().splitlines()[0]}") from error
    if options.num_classes is not None:
        config.num_labels = options.num_classes
    return config


def _model_class(config: Any) -> Any:
    """The class that config.json names; of a model for pre-training its encoder, which runs on a device."""
    own = getattr(config, "auto_map", None) or {}
    if own:
        return AutoModelForImageClassification if "AutoModelForImageClassification" in own else AutoModel
    named = (config.architectures or [""])[0]
    kind = None if named.endswith(_TRAINING) else getattr(transformers, named, None)
    if kind is not None:
        return kind
    try:
        kind = AutoModel._model_mapping[type(config)]
    except KeyError as error:
        raise InputError(f"transformers has no model for {config.model_type!r}") from error
    return kind[0] if isinstance(kind, tuple) else kind


def _random(kind: Any, config: Any) -> nn.Module:
    if kind in (AutoModel, AutoModelForImageClassification):
        module: nn.Module = kind.from_config(config, trust_remote_code=True)  # allowed where config was read
        return module
    made: nn.Module = kind(config)
    return made


def _with_weights(
    name: str, kind: Any, config: Any, options: LoadOptions
) -> tuple[nn.Module, tuple[str, ...]]:
    """from_pretrained, with every weight accounted for."""
    try:
        module, info = kind.from_pretrained(
            name,
            config=config,
            output_loading_info=True,
            trust_remote_code=options.trust_remote_code,
            ignore_mismatched_sizes=options.num_classes is not None,
        )
    except UnpicklingError as error:
        raise UntrustedInput(
            f"the weights of hf:{name} would have to be executed to be read", "use a folder with safetensors"
        ) from error
    except (RuntimeError, SafetensorError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        if "size" in reason or "shape" in reason:
            raise CheckpointError(f"the weights of hf:{name} do not fit its config.json: {reason}") from error
        if not Path(name).is_dir():
            raise  # a failed download
        raise InputError(f"the weights of hf:{name} cannot be read: {reason}") from error
    missing = sorted(info["missing_keys"])
    if missing and all(".pooler." in f".{key}" for key in missing):
        # DINO's and MAE's checkpoints have none; random weights would be used.
        _owner_of_pooler(module).pooler = None  # type: ignore[assignment]
        return module, ("no pooler in the weights: the class token is the output",)
    if missing:
        raise CheckpointError(f"hf:{name} has no weights for {len(missing)} parameters: {some(missing)}")
    notes = [f"left out {len(info['unexpected_keys'])} weights: {some(sorted(info['unexpected_keys']))}"]
    mismatched = [str(key[0]) for key in info["mismatched_keys"]]
    random = [f"random weights, as --num-classes asks: {some(sorted(mismatched))}"]
    return module, (*(notes if info["unexpected_keys"] else ()), *(random if mismatched else ()))


def _owner_of_pooler(module: nn.Module) -> nn.Module:
    return next(m for m in module.modules() if "pooler" in m._modules)


def _processor(name: str, config: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """preprocessor_config.json, else what transformers' processor of this family does by default."""
    folder = Path(name)
    if (folder / _PROCESSOR).is_file():
        try:
            content: dict[str, Any] = json.loads((folder / _PROCESSOR).read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{folder / _PROCESSOR} is not JSON: {error}") from error
        return content, ()
    if not folder.is_dir():
        facts, _ = ImageProcessingMixin.get_image_processor_dict(name)
        return dict(facts), ()
    if type(config) not in IMAGE_PROCESSOR_MAPPING.keys():  # noqa: SIM118 - a lazy mapping without `in`
        return _IMAGENET, (f"no {_PROCESSOR}: ImageNet mean and std assumed",)
    processor = next(iter(IMAGE_PROCESSOR_MAPPING[type(config)].values()))
    return class_facts(processor), (f"no {_PROCESSOR}: {processor.__name__}'s own values assumed",)


def _image_size(config: Any) -> Size:
    size = getattr(config, "image_size", None)
    return pair(size) if size is not None else (224, 224)
