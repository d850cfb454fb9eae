"""Reading checkpoints without running them, and loading them without ignoring anything."""

from __future__ import annotations

import pickle
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vit_export.errors import CheckpointError, InputError, UntrustedInput
from vit_export.models import tables

State = dict[str, Tensor]

# Where training scripts keep the weights inside a file; averaged weights first, as timm evaluates them.
CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model", "module", "teacher")
# Added to every name by DistributedDataParallel, torch.compile, Lightning.
PREFIXES = ("module.", "_orig_mod.", "model.")
_SHOWN = 8
_MAGIC = (b"PK", b"\x80")  # a zip as torch writes it, a pickle as old torch wrote it


def load_checkpoint(module: nn.Module, path: Path) -> tuple[str, ...]:
    """Load a safetensors file or a state dict over `module`, strictly; says what had to be done.

    Position tables of another resolution are resampled to the module's grid. Anything else that does
    not match in name or shape is an error.

    Raises CheckpointError listing what does not match, UntrustedInput for a file that needs pickle,
    InputError for a missing or broken file.
    """
    state, notes = read_state(path)
    state, renamed = _convert(module, state)
    state, resampled = tables.fit(module, state)
    _require_match(module, state, path)
    module.load_state_dict(state, strict=True)
    return (*notes, *renamed, *resampled)


def read_state(path: Path) -> tuple[State, tuple[str, ...]]:
    """Tensors by name from a checkpoint file, taken out of its container, and notes on that."""
    if not path.is_file():
        raise InputError(f"no checkpoint at {path}", "give a .safetensors file or a saved state dict")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    return _unwrap(content, path)


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a readable safetensors file: {error}") from error


def _read_torch(path: Path) -> Mapping[str, Any]:
    with path.open("rb") as file:
        if not file.read(2).startswith(_MAGIC):
            raise InputError(f"{path} is not a checkpoint: neither safetensors nor saved by torch")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about the pickle protocol
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UntrustedInput(
            f"{path} holds more than tensors and would have to be executed to be read",
            "save only the weights: safetensors.torch.save_file(model.state_dict(), 'model.safetensors')",
        ) from error
    except Exception as error:  # torch's own unpickler raises IndexError and more on damaged bytes
        raise InputError(f"{path} is not a readable checkpoint: {_first_line(error)}") from error
    if not isinstance(content, Mapping):
        raise InputError(f"{path} holds a {type(content).__name__}, not a state dict")
    return content


def _unwrap(content: Mapping[str, Any], path: Path) -> tuple[State, tuple[str, ...]]:
    """The mapping of tensors inside common containers."""
    notes: list[str] = []
    while not any(isinstance(v, Tensor) for v in content.values()):
        key = next((k for k in CONTAINERS if isinstance(content.get(k), Mapping)), None)
        if key is None:
            raise CheckpointError(
                f"{path} holds no tensors under its keys: {some([str(k) for k in content])}",
                f"the weights are looked for at the top and under {', '.join(CONTAINERS)}",
            )
        notes.append(f"checkpoint: took {key!r} of {some([str(k) for k in content])}")
        content = content[key]
    return {str(k): v for k, v in content.items() if isinstance(v, Tensor)}, tuple(notes)


def _convert(module: nn.Module, state: State) -> tuple[State, tuple[str, ...]]:
    """Strip wrapper prefixes and, for a timm model, translate the authors' names as timm does."""
    own = module.state_dict().keys()
    notes: list[str] = []
    for prefix in PREFIXES:
        if all(k.startswith(prefix) for k in state) and not any(k.startswith(prefix) for k in own):
            state = {k.removeprefix(prefix): v for k, v in state.items()}
            notes.append(f"checkpoint: dropped the prefix {prefix!r} from every name")
    if state.keys() != own:
        translate = getattr(sys.modules[type(module).__module__], "checkpoint_filter_fn", None)
        if translate is not None and type(module).__module__.startswith("timm."):
            translated: State = translate(dict(state), module)
            if len(own ^ translated.keys()) < len(own ^ state.keys()):
                notes.append("checkpoint: names translated by timm")
                state = translated
    return state, tuple(notes)


def _require_match(module: nn.Module, state: State, path: Path) -> None:
    own = module.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [
        f"{name} {list(state[name].shape)} for {list(own[name].shape)}"
        for name in own.keys() & state.keys()
        if state[name].shape != own[name].shape
    ]
    if not (missing or unexpected or shapes):
        return
    parts = {"missing": missing, "not in the model": unexpected, "of another shape": sorted(shapes)}
    listed = "; ".join(f"{len(names)} {what}: {some(names)}" for what, names in parts.items() if names)
    raise CheckpointError(f"{path.name} does not fit {type(module).__name__}: {listed}", _hint(own, state))


def _hint(own: Mapping[str, Tensor], state: State) -> str:
    """--num-classes when only the classifier's rows differ."""
    different = {k for k in own.keys() & state.keys() if own[k].shape != state[k].shape}
    rows = {state[k].shape[0] for k in different}
    heads = all(own[k].shape[1:] == state[k].shape[1:] and k.endswith(("weight", "bias")) for k in different)
    if own.keys() == state.keys() and len(rows) == 1 and heads:
        return f"only the classifier differs: pass --num-classes {rows.pop()}"
    return "is it the checkpoint of this model? --model must name the same architecture"


def some(names: list[str]) -> str:
    """The first few names and how many more there are."""
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
