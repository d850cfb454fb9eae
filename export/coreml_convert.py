"""From a saved torch.export program to a Core ML package: all that coremltools does, in a child process.

Unlike the steps of other targets this one pays for torch as well, which coremltools reads programs with.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.ao.quantization.fx._decomposed
from torch.export import ExportedProgram
from torch.fx import Node

from vit_export.artifacts import Precision, Preprocessing, Size
from vit_export.errors import InputError, TargetError, UnsupportedOperator
from vit_export.export import coreml_gaps
from vit_export.export.coreml_compress import Compression, blocks, count, palettes
from vit_export.export.coreml_metadata import describe, finish
from vit_export.export.coreml_options import CoreMLOptions
from vit_export.export.graph import module_path

INPUT, IMAGE, OUTPUT = "images", "image", "logits"
LABEL, PROBABILITIES = "classLabel", "probabilities"
_MISSING = re.compile(r"(?:Unsupported fx node|convert function for op) '?([\w.]+)'?")


@dataclass(frozen=True, slots=True)
class Conversion:
    """What is made of a program. name: of the model, for the package's description.

    channels: full name of each linear's or convolution's weight → output channels, for palettes. grouped:
    full names of the weights that lie on a grid of four-bit blocks. user_defined: `coreml_metadata.facts`.
    """

    precision: Precision
    batch_size: int
    image_size: Size
    preprocessing: Preprocessing
    options: CoreMLOptions
    name: str
    channels: Mapping[str, int]
    grouped: tuple[str, ...]
    user_defined: Mapping[str, str]


def write_package(source: Path, package: Path, asked: Conversion) -> Compression:
    """Lower the program in `source` (.pt2); everything outside Q/DQ computes in fp16 unless it is FP32.

    Raises UnsupportedOperator with the operator and its module path, InputError for labels that are not
    as many as the classes, TargetError for what else coremltools refuses.
    """
    program = torch.export.load(source)
    model = _converted(program, asked)
    with quiet():
        model.save(str(package))
    spec = finish(
        package, describe(asked.precision, asked.preprocessing, asked.name, asked.options), asked.user_defined
    )
    return count(spec, _names(program))


def _converted(source: ExportedProgram, asked: Conversion) -> Any:
    """coremltools' MLModel."""
    with quiet():
        import coremltools as ct
    options = asked.options
    outputs, classifier = [ct.TensorType(OUTPUT, dtype=np.float32)], None
    if options.labels:
        _check_labels(source, options.labels)
        outputs.append(ct.TensorType(PROBABILITIES, dtype=np.float32))
        classifier = ct.ClassifierConfig(list(options.labels), LABEL, PROBABILITIES)
    try:
        with quiet():
            return ct.convert(
                source,
                convert_to="mlprogram",
                minimum_deployment_target=getattr(ct.target, options.target),
                compute_precision=_precision(ct, asked.precision),
                inputs=[_input(ct, options, (asked.batch_size, 3, *asked.image_size))],
                outputs=outputs,
                classifier_config=classifier,
                pass_pipeline=coreml_gaps.pipeline(_palettes(source, asked), _blocks(source, asked)),
                skip_model_load=True,
            )
    except Exception as error:  # coremltools raises many types; all mean "refused"
        raise _explained(error, source) from error


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


def _palettes(source: ExportedProgram, asked: Conversion) -> Any:
    """Which weights get a palette; None without --palettize."""
    if not asked.options.palettize:
        return None
    known = _names(source).items()
    return palettes(
        {name: asked.channels[full] for name, full in known if full in asked.channels}, asked.options
    )


def _blocks(source: ExportedProgram, asked: Conversion) -> Any:
    """Which weights are stored in four-bit blocks; None for none."""
    names = [name for name, full in _names(source).items() if full in asked.grouped]
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
