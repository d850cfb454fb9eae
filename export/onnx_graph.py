"""Lowering a program to ONNX: torch's exporter, then our passes, then a check."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir
import torch

from vit_export.artifacts import Program, TargetProfile
from vit_export.errors import TargetError, UnsupportedOperator
from vit_export.export.graph import exact_attention
from vit_export.export.onnx_passes import PASSES
from vit_export.export.program import exported

INPUT, OUTPUT = "images", "logits"
_IR_VERSION = 10  # readable by every ONNX Runtime since 1.18
_EXTERNAL_ABOVE = 1_900_000_000  # bytes; protobuf stops at 2^31
_OPSETS = range(17, 24)


def to_onnx(program: Program, profile: TargetProfile, *, batch_size: int | None = None) -> ir.Model:
    """The program as an ONNX graph with one input `images` and one output `logits`.

    Names of nodes and initializers are module paths; source paths and stack traces are stripped.

    Raises UnsupportedOperator with the operator and its module path, TargetError for an opset outside
    17..23.
    """
    if profile.opset not in _OPSETS:
        raise TargetError(f"opset {profile.opset} is not supported", f"use {_OPSETS[0]} to {_OPSETS[-1]}")
    source = exported(program, batch_size=batch_size)
    opset = min(profile.opset, 22) if profile.attention == "decomposed" else profile.opset
    try:
        with exact_attention(), quiet():
            result = torch.onnx.export(
                source,
                (),
                dynamo=True,
                opset_version=opset,
                input_names=[INPUT],
                output_names=[OUTPUT],
                verbose=False,
            )
    except Exception as error:  # the exporter raises several private types
        raise _explained(error) from error
    assert result is not None
    model = result.model
    model.ir_version = _IR_VERSION
    for apply in PASSES:
        apply(model)
    return model


def save(model: ir.Model, path: Path) -> None:
    """Write and check an ONNX file; weights beside it (`NAME.onnx.data`) above 1.9 GB.

    Raises TargetError when onnx's checker refuses the graph.
    """
    import onnx

    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    external = f"{path.name}.data" if size > _EXTERNAL_ABOVE else None
    ir.save(model, path, external_data=external)
    try:
        onnx.checker.check_model(str(path), full_check=external is None)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise TargetError(f"onnx refused the exported graph: {error}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporter's progress prints and warnings out of the user's terminal."""
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")
        for name in ("torch.onnx", "onnxscript", "torch.export"):
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        yield


def _explained(error: BaseException) -> TargetError:
    """Name the operator and the module path behind an exporter failure."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    for link in chain:
        node = getattr(link, "node", None)
        text = str(link)
        if "No ONNX function found" in text or "No decompositions" in text or "not supported" in text:
            return UnsupportedOperator(
                f"ONNX has no translation for {_between(text)}{_where(node, text)}",
                "replace the operator in the model, or leave the module out of the exported forward",
            )
    lines = str(chain[-1]).strip().splitlines()
    return TargetError(f"the ONNX exporter failed: {lines[0][:300] if lines else type(error).__name__}")


def _between(text: str) -> str:
    for opening, closing in (("OpOverload(op='", "'"), ("found for ", ".")):
        if opening in text:
            return text.split(opening, 1)[1].split(closing, 1)[0]
    return text.splitlines()[0][:120]


def _where(node: object, text: str) -> str:
    from vit_export.export.graph import module_path

    if isinstance(node, torch.fx.Node):
        return f" in {module_path(node) or 'the top module'}"
    return ""
