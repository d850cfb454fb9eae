"""Lowering a program to a Core ML package through torch.export and coremltools."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.export import ExportedProgram
from torch.fx import Node

from vit_export.artifacts import BuildRequest, Precision, Program
from vit_export.errors import InputError, TargetError, UnsupportedOperator
from vit_export.export import coreml_gaps, coreml_graph
from vit_export.export.coreml_compress import blocks, palettes
from vit_export.export.coreml_options import CoreMLOptions
from vit_export.export.graph import exact_attention, module_path
from vit_export.export.program import exported

INPUT, IMAGE, OUTPUT = "images", "image", "logits"
LABEL, PROBABILITIES = "classLabel", "probabilities"
_MISSING = re.compile(r"(?:Unsupported fx node|convert function for op) '?([\w.]+)'?")


@dataclass(frozen=True, slots=True)
class Converted:
    """model: a coremltools MLModel. names: its names of constants → module paths."""

    model: Any
    names: Mapping[str, str]


def convert(program: Program, request: BuildRequest, options: CoreMLOptions) -> Converted:
    """Lower a program; everything outside Q/DQ computes in fp16 unless the precision is FP32.

    Raises UnsupportedOperator with the operator and its module path, InputError for labels that are not
    as many as the classes, TargetError for what else coremltools refuses.
    """
    with quiet():
        import coremltools as ct
    batch = request.batch_size or 1
    grouped: tuple[str, ...] = ()
    if options.weights == "int4":
        program, grouped = coreml_graph.float_groups(program)
    with exact_attention():
        prepared = _prepared(program, request, options)
        source = exported(prepared, batch_size=batch).run_decompositions({})
    outputs, classifier = [ct.TensorType(OUTPUT, dtype=np.float32)], None
    if options.labels:
        _check_labels(source, options.labels)
        outputs.append(ct.TensorType(PROBABILITIES, dtype=np.float32))
        classifier = ct.ClassifierConfig(list(options.labels), LABEL, PROBABILITIES)
    try:
        with quiet():
            model = ct.convert(
                source,
                convert_to="mlprogram",
                minimum_deployment_target=getattr(ct.target, options.target),
                compute_precision=_precision(ct, request.precision),
                inputs=[_input(ct, options, (batch, 3, *program.image_size))],
                outputs=outputs,
                classifier_config=classifier,
                pass_pipeline=coreml_gaps.pipeline(
                    _palettes(source, program, options), _blocks(source, grouped)
                ),
                skip_model_load=True,
            )
    except Exception as error:  # coremltools raises many types; all mean "refused"
        raise _explained(error, source) from error
    return Converted(model, _names(source))


def _prepared(program: Program, request: BuildRequest, options: CoreMLOptions) -> Program:
    """The program with the asked input and outputs, and the quantisation the package is to keep."""
    if options.palettize:
        program = coreml_graph.float_weights(program)
    if options.target == "iOS17":
        program = coreml_graph.unsigned_weights(program)
    if options.labels:
        program = coreml_graph.add_probabilities(program)
    if options.input == "image":
        program = coreml_graph.take_pixels(program, request.preprocessing)
    return program


def _input(ct: Any, options: CoreMLOptions, shape: tuple[int, ...]) -> Any:
    if options.input == "image":
        return ct.ImageType(IMAGE, shape, color_layout=ct.colorlayout.RGB)
    return ct.TensorType(INPUT, shape, dtype=np.float32)


def _precision(ct: Any, precision: Precision) -> Any:
    """fp16 for all but the normalisation of pixels, whose constants would lose three digits."""
    if precision is Precision.FP32:
        return ct.precision.FLOAT32
    return ct.transform.FP16ComputePrecision(op_selector=lambda op: not _normalises(op))


def _normalises(op: Any) -> bool:
    """Whether an operation does the arithmetic of `take_pixels`: it reads the input, or one that does."""
    if op.op_type not in ("mul", "add"):
        return False
    source = op.inputs["x"].op
    return source is None or bool(_normalises(source))


def _palettes(source: ExportedProgram, program: Program, options: CoreMLOptions) -> Any:
    """Which weights get a palette; None without --palettize."""
    if not options.palettize:
        return None
    channels = {layer.weight: layer.shape[0] for layer in program.layers}
    names = _names(source).items()
    return palettes({name: channels[full] for name, full in names if full in channels}, options)


def _blocks(source: ExportedProgram, grouped: Collection[str]) -> Any:
    """Which weights are stored in four-bit blocks; None for none."""
    names = [name for name, full in _names(source).items() if full in grouped]
    return blocks(names) if names else None


def _names(source: ExportedProgram) -> dict[str, str]:
    """MIL calls a constant as torch.export called its placeholder; → fully qualified name."""
    signature = source.graph_signature
    return {**signature.inputs_to_parameters, **signature.inputs_to_buffers}


def _check_labels(source: ExportedProgram, labels: tuple[str, ...]) -> None:
    output = next(iter(source.graph.find_nodes(op="output")))
    classes = output.args[0][0].meta["val"].shape[-1]
    if len(labels) != classes:
        raise InputError(
            f"{len(labels)} labels for a model with {classes} classes", "give one a line, in index order"
        )


def _explained(error: Exception, source: ExportedProgram) -> TargetError:
    """The error a user can act on, with the operator and the module that calls it where they are known."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    missing = _MISSING.search(line)
    if not missing:
        return TargetError(f"Core ML refused the graph: {line[:300]}")
    found = next((n for n in source.graph.nodes if missing[1] in (n.name, _operator(n))), None)
    operator = missing[1] if found is None else _operator(found)
    place = "" if found is None else module_path(found)
    return UnsupportedOperator(
        f"Core ML does not take operator {operator}" + (f" of {place}" if place else "")
    )


def _operator(node: Node) -> str:
    """`alias` for a call of aten.alias.default."""
    return str(node.target).removeprefix("aten.").removesuffix(".default")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep coremltools' progress bars and version warnings out of the user's terminal."""
    logger = logging.getLogger("coremltools")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)
