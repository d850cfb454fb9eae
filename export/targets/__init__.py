"""The targets: one file each, found through this table and imported when asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import cast

from vit_export.errors import UsageError
from vit_export.export.target import Target

TARGETS: Mapping[str, str] = {
    "onnx": "vit_export.export.targets.ort_model:OrtTarget",
    "openvino": "vit_export.export.targets.openvino_ir:OpenVinoTarget",
    "tensorrt": "vit_export.export.targets.tensorrt_engine:TensorRtTarget",
    "coreml": "vit_export.export.targets.coreml_package:CoreMLTarget",
}


def target_named(name: str) -> Target:
    """The target of this name. Raises UsageError that lists the names, MissingExtra without its SDK."""
    if name not in TARGETS:
        raise UsageError(f"unknown target {name!r}", f"targets: {', '.join(TARGETS)}, all")
    module, _, attribute = TARGETS[name].partition(":")
    return cast(type[Target], getattr(importlib.import_module(module), attribute))()
