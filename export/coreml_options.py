"""What can be said about a Core ML artifact on the command line. Imports no SDK."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vit_export.artifacts import WeightsOnly
from vit_export.errors import InputError, UsageError

_CHOICES: Mapping[str, tuple[object, ...]] = {
    "target": ("iOS17", "iOS18"),
    "input": ("tensor", "image"),
    "palettize": (0, 4, 6),
    "activations": ("asymmetric", "symmetric"),
    "weights": ("int8", "int4"),
}


@dataclass(frozen=True, slots=True)
class CoreMLOptions:
    """Options of the target; `of` reads them under their command line names.

    target: oldest system that opens the package (iOS18 = macOS 15). iOS 18 keeps attention as one
    operation and stores 4 and 6 bit weights with a palette for each group of channels.
    input: float32 NCHW, or a uint8 RGB image that the package normalises itself.
    labels: class names in index order make the package a classifier; its logits stay an output.
    palettize: bits of a weight palette in fp16 and int8 packages, 0 for none.
    activations: of int8. Asymmetric keeps far more of a ViT (DINOv2-S: 21 dB against 13), whose GELU outputs
    are nearly all positive; symmetric is the scheme of Apple's own examples for integer products on the
    Neural Engine. weights: quantise these alone, in eight bits a channel or (iOS 18) four bits a block.
    """

    target: Literal["iOS17", "iOS18"] = "iOS18"
    input: Literal["tensor", "image"] = "tensor"
    labels: tuple[str, ...] = ()
    palettize: Literal[0, 4, 6] = 0
    activations: Literal["asymmetric", "symmetric"] = "asymmetric"
    weights: WeightsOnly | None = None
    author: str = ""
    license: str = ""

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> CoreMLOptions:
        """From `coreml_target`, `coreml_input`, `coreml_activations`, `palettize`, `weights`, `labels` (names
        or a file with one a line), `author` and `license`; what is absent or None keeps its default.

        Raises UsageError for a value that is no choice, InputError for a label file that is not one.
        """
        given: dict[str, Any] = {
            "target": options.get("coreml_target"),
            "input": options.get("coreml_input"),
            "activations": options.get("coreml_activations"),
            "palettize": options.get("palettize"),
            "weights": options.get("weights"),
            "labels": _labels(options.get("labels")),
            "author": options.get("author"),
            "license": options.get("license"),
        }
        for name, choices in _CHOICES.items():
            if given[name] is not None and given[name] not in choices:
                known = ", ".join(map(str, choices))
                raise UsageError(f"Core ML has no {name} {given[name]!r}", f"choose one of {known}")
        chosen = cls(**{name: value for name, value in given.items() if value is not None})
        if chosen.weights and chosen.palettize:
            raise UsageError("--weights and --palettize are two ways to store a weight", "give one of them")
        if chosen.weights == "int4" and chosen.target == "iOS17":
            raise UsageError("iOS 17 has no four-bit blocks", "--coreml-target iOS18, or --palettize 4")
        return chosen


def _labels(given: Any) -> tuple[str, ...] | None:
    """Class names from a sequence or a UTF-8 file."""
    if given is None or isinstance(given, tuple | list):
        return given if given is None else tuple(given)
    try:
        names = tuple(Path(given).read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read labels from {given}: {error}") from error
    if not names or not all(name.strip() for name in names):
        raise InputError(f"{given} must hold one class name a line, and no empty line")
    return names
