"""Several packages as functions of one, sharing the weights that are equal. Runs in a child process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vit_export.export.coreml_convert import quiet
from vit_export.export.coreml_metadata import DIGEST_KEY, PREPROCESSING_KEY, finish, read_spec


def combine(packages: Mapping[str, Path], folder: Path) -> Path:
    """Write `folder/model.mlpackage` with one function a package; the first is the default.

    The metadata is that of the first, with every function's own preprocessing beside it. Needs iOS 18.
    """
    with quiet():
        import coremltools as ct
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.mlpackage"
    functions = ct.utils.MultiFunctionDescriptor()
    for name, package in packages.items():
        functions.add_function(str(package), "main", name)
    functions.default_function_name = next(iter(packages))
    with quiet():
        ct.utils.save_multifunction(functions, str(path))
    specs = {name: read_spec(package) for name, package in packages.items()}
    finish(path, lambda description: _describe(description, specs), _user_defined(specs))
    return path


def _describe(description: Any, specs: Mapping[str, Any]) -> None:
    """Texts of the packages: the first's for the whole, each one's for its inputs and outputs."""
    description.metadata.CopyFrom(next(iter(specs.values())).description.metadata)
    for function in description.functions:
        source = specs[function.name].description
        for ours, theirs in ((function.input, source.input), (function.output, source.output)):
            for feature, described in zip(ours, theirs, strict=True):
                feature.shortDescription = described.shortDescription


def _user_defined(specs: Mapping[str, Any]) -> dict[str, str]:
    stored = {name: spec.description.metadata.userDefined for name, spec in specs.items()}
    first = next(iter(stored.values()))
    return {
        **{key: value for key, value in first.items() if not key.startswith(DIGEST_KEY)},
        **{f"{PREPROCESSING_KEY}.{name}": facts[PREPROCESSING_KEY] for name, facts in stored.items()},
    }
