"""From ranges to decisions: which layers become int8, which stay float and why; plan.json."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import msgspec

from vit_export.artifacts import Layer, LayerPlan, QuantPlan, Ranges, WeightsOnly
from vit_export.errors import InputError, UsageError

SCHEMA = "vit-export.plan/1"
MAX_BYTES = 64 << 20
GROUP = 32  # columns that share a scale of four-bit weights: the least that runtimes take alike


def plan(
    ranges: Ranges,
    layers: Sequence[Layer],
    *,
    keep_float: Sequence[str] = (),
    seed: int = 0,
    weights: WeightsOnly | None = None,
) -> QuantPlan:
    """Every linear and convolution in int8 with its observed range, except those a pattern keeps float.

    keep_float: shell patterns over layer names; `*` also crosses dots (`blocks.0.*`, `*.mlp.fc2`, `head`).
    weights: quantise these alone; `int4` gives linears four bits in groups of GROUP columns, and eight to
    those whose columns no such groups divide.
    Raises UsageError for a pattern that matches no layer, InputError for a layer without a range.
    """
    names = [layer.name for layer in layers]
    for pattern in keep_float:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UsageError(f"--keep-float {pattern} matches no layer", _near(pattern, names))
    missing = [name for name in names if name not in ranges.inputs]
    if missing:
        raise InputError(
            f"no range for {', '.join(missing[:3])}", "the ranges are of another model; calibrate again"
        )
    decided = tuple(_decide(layer, ranges, keep_float, weights == "int4") for layer in layers)
    return QuantPlan(ranges.method, seed, ranges.images, decided, weights_only=weights is not None)


def _decide(layer: Layer, ranges: Ranges, keep_float: Sequence[str], four: bool) -> LayerPlan:
    name = layer.name
    for pattern in keep_float:
        if fnmatchcase(name, pattern):
            return LayerPlan(name, False, ranges.inputs[name], reason=f"--keep-float {pattern}")
    if four and layer.kind == "linear" and layer.shape[1] % GROUP == 0:
        return LayerPlan(name, True, ranges.inputs[name], weight_bits=4, group=GROUP)
    return LayerPlan(name, True, ranges.inputs[name])


def _near(pattern: str, names: Sequence[str]) -> str:
    """A hint with the layer names that look most like the pattern."""
    near = difflib.get_close_matches(pattern.replace("*", ""), names, n=3, cutoff=0.3) or names[:3]
    return f"layers are named like {', '.join(near)}"


def save(plan: QuantPlan, path: Path) -> None:
    """Write plan.json: the same plan gives the same bytes; the file appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(plan), indent=2) + b"\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path) -> QuantPlan:
    """A plan written by `save`, or by hand. Raises InputError, with the place, for anything else."""
    try:
        if path.exists() and not path.is_file():  # a device or a pipe may never end
            raise InputError(f"{path} is not a file")
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path} is too large for a plan: {path.stat().st_size} bytes")
        content = path.read_bytes()
        plan = msgspec.json.decode(content, type=QuantPlan)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (msgspec.ValidationError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not a plan: {error}") from error
    known = msgspec.json.decode(msgspec.json.encode(plan))
    problem = _problem(plan) or _unknown_key(msgspec.json.decode(content), known)
    if problem:
        raise InputError(f"{path} is not a valid plan: {problem}")
    return plan


def _problem(plan: QuantPlan) -> str:
    """What types cannot say; empty for a good plan."""
    if plan.schema != SCHEMA:
        return f"schema {plan.schema}, this version reads {SCHEMA}"
    seen: set[str] = set()
    for layer in plan.layers:
        if layer.name in seen:
            return f"{layer.name} is there twice"
        seen.add(layer.name)
        if layer.quantized and layer.input is None and not plan.weights_only:
            return f"{layer.name} is quantised but has no input range"
        if layer.input and not -math.inf < layer.input.low <= layer.input.high < math.inf:
            return f"{layer.name} has the range {layer.input.low} to {layer.input.high}"
        if not 2 <= layer.weight_bits <= 8:
            return f"{layer.name} has {layer.weight_bits} weight bits"
        if layer.group < 0:
            return f"{layer.name} has groups of {layer.group} columns"
    return ""


def _unknown_key(given: object, known: object) -> str:
    """The first key of `given` that the decoded plan does not have; a typo must not pass in silence."""
    if isinstance(given, dict) and isinstance(known, dict):
        for key, value in given.items():
            if key not in known:
                return f"unknown key {key}"
            if deeper := _unknown_key(value, known[key]):
                return deeper
    elif isinstance(given, list) and isinstance(known, list):
        return next(filter(None, map(_unknown_key, given, known)), "")
    return ""
