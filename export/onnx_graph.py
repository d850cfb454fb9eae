"""Lowering a program to ONNX: torch's exporter, then our passes, then a check."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir
import torch
from torch.export import ExportedProgram

from vit_export.artifacts import Program, TargetProfile
from vit_export.errors import TargetError, UnsupportedOperator
from vit_export.export.graph import exact_attention, module_path
from vit_export.export.onnx_passes import PASSES
from vit_export.export.program import exported

INPUT, OUTPUT = "images", "logits"
_IR_VERSION = 10  # readable by every ONNX Runtime since 1.18
_EXTERNAL_ABOVE = 1_900_000_000  # bytes; protobuf stops at 2^31
_OPSETS = range(17, 24)
_OPERATOR = re.compile(r"No ONNX function found for <OpOverload\(op='([^']+)'")


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
        raise _explained(error, source) from error
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


def _explained(error: BaseException, source: ExportedProgram) -> TargetError:
    """Name the operator and the module path behind an exporter failure."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    for text in map(str, chain):
        if operator := _OPERATOR.search(text):
            return UnsupportedOperator(
                f"ONNX has no translation for {operator[1]} in {_module_of(operator[1], source)}",
                "replace the operator in the model, or leave its module out of the exported forward",
            )
    lines = str(chain[-1]).strip().splitlines()
    return TargetError(f"the ONNX exporter failed: {lines[0][:300] if lines else type(error).__name__}")


def _module_of(operator: str, source: ExportedProgram) -> str:
    """The module whose forward calls an operator, which may appear only after decomposition."""
    for node in source.run_decompositions().graph.nodes:
        if str(node.target).startswith(operator):
            return module_path(node) or "the top module"
    return "an unknown module"
