"""`path/file.py:FACTORY`: a user's own module, made by calling their factory."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from vit_export.artifacts import LoadedModel, Preprocessing, Size
from vit_export.errors import InputError, UsageError
from vit_export.models.checkpoint import load_checkpoint
from vit_export.models.config import LoadOptions
from vit_export.models.finish import assumed, finish


def load(name: str, options: LoadOptions) -> LoadedModel:
    """Run the file, call the factory and take the module it returns.

    The factory takes no argument, or `num_classes`. A timm model keeps timm's data config; else a
    `preprocessing` attribute of the file (artifacts.Preprocessing or its fields as a dict) is used.

    Raises UsageError for a wrong SPEC, InputError when the file or factory fails.
    """
    path, _, factory = name.rpartition(":")
    script = _run(Path(path))
    module = _make(script, factory, options)
    notes = load_checkpoint(module, options.checkpoint) if options.checkpoint else ()
    preprocessing, size, said = _preprocessing(script, module, options)
    return finish(
        module,
        family=type(module).__name__,
        preprocessing=preprocessing,
        options=options,
        size=size,
        notes=(*notes, *said),
    )


def _run(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"no file at {path}", "SPEC is path/file.py:FACTORY")
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    assert spec is not None and spec.loader is not None  # a .py file always has them
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    sys.path.insert(0, str(path.resolve().parent))  # as `python file.py` does, for the file's neighbours
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"{path} failed to run: {_said(error)}") from error
    finally:
        sys.path.remove(str(path.resolve().parent))
    return module


def _make(script: ModuleType, factory: str, options: LoadOptions) -> nn.Module:
    made: Any = getattr(script, factory, None)
    if made is None:
        own = [n for n, v in vars(script).items() if getattr(v, "__module__", "") == script.__name__]
        raise UsageError(
            f"{script.__name__}.py has no {factory}", f"it defines: {', '.join(own) or 'nothing'}"
        )
    if not isinstance(made, nn.Module):
        made = _call(made, factory, options)
    if not isinstance(made, nn.Module):
        raise InputError(f"{factory} returned {type(made).__name__}, not a torch.nn.Module")
    return made


def _call(factory: Callable[..., Any], name: str, options: LoadOptions) -> Any:
    arguments: dict[str, Any] = {}
    if options.num_classes is not None:
        if "num_classes" not in inspect.signature(factory).parameters:
            raise UsageError(f"{name} takes no num_classes", "leave out --num-classes")
        arguments["num_classes"] = options.num_classes
    try:
        return factory(**arguments)
    except Exception as error:
        raise InputError(f"{name}() failed: {_said(error)}") from error


def _preprocessing(
    script: ModuleType, module: nn.Module, options: LoadOptions
) -> tuple[Preprocessing, Size | None, tuple[str, ...]]:
    """The contract, the image size where the file or timm states one, and what was assumed."""
    own = getattr(script, "preprocessing", None)
    if own is not None:
        try:
            stated = own if isinstance(own, Preprocessing) else Preprocessing(**own)
        except TypeError as error:
            raise InputError(f"preprocessing in {script.__name__}.py: {error}") from error
        return stated, stated.size, ()
    for part in module.modules():
        if hasattr(part, "pretrained_cfg"):
            from vit_export.models.timm_source import preprocessing_of

            of_timm = preprocessing_of(part)
            return of_timm, of_timm.size, ()
    preprocessing, notes = assumed(options)
    return preprocessing, None, notes


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
