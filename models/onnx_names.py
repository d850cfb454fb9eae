"""Names for what an ONNX file calls `onnx::MatMul_1204`: module paths like the source model's."""

from __future__ import annotations

import ast
import re
from itertools import pairwise

from torch import nn

from vit_export.models.onnx_module import Step

_WEIGHT = re.compile(r"^(?P<path>[A-Za-z_][\w.]*?)\.(weight|bias)$")


def clean(name: str) -> str:
    """A name as a parameter path: `/blocks.0/Constant_1_output_0` → `blocks.0.Constant_1_output_0`."""
    parts = re.split(r"[./:]+", name.strip("/"))
    return ".".join(re.sub(r"\W", "_", part) or "_" for part in parts) or "_"


def layer_path(weight: str, step: Step) -> str:
    """Where a layer goes: by its weight's name, else the exporter's scopes, else the node's name."""
    match = _WEIGHT.match(weight)
    if match:
        return match["path"]
    scopes = [s for s in _scopes(step.scope)[:-1] if s]  # the last one is the operator itself
    if scopes:
        return scopes[-1]
    parts = [p for p in step.label.partition(" ")[2].strip("/").split("/") if p]
    nested = [p for p, after in pairwise(parts) if not after.startswith(f"{p}.")]
    return clean("/".join(nested or parts))


def container(module: nn.Module, path: str) -> nn.Module:
    """The submodule at a path, made of empty modules where there is none."""
    for part in path.split(".") if path else ():
        if part not in module._modules:
            module.add_module(part, nn.Module())
        child = module._modules[part]
        assert child is not None
        module = child
    return module


def unique(module: nn.Module, name: str) -> str:
    """`name`, or with a number where the module has something else under it."""
    free, count = name, 1
    while hasattr(module, free):
        count += 1
        free = f"{name}_{count}"
    return free


def _scopes(written: str) -> list[str]:
    """torch's exporter writes them as a Python list: `['', 'blocks', 'blocks.0', 'linear_1']`."""
    try:
        scopes = ast.literal_eval(written) if written else []
    except (ValueError, SyntaxError):
        return []
    return [str(scope) for scope in scopes] if isinstance(scopes, list) else []
