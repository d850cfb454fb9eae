"""Every family as an ONNX file in ONNX Runtime: at four sizes in float, at one of them in int8."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from contracts.families import FAMILIES, images
from vit_export.artifacts import BuildRequest, BuiltArtifact, LoadedModel, Logits, Precision, Program
from vit_export.build_size import export
from vit_export.calibration.collect import calibrate
from vit_export.calibration.observers import MinMaxConfig
from vit_export.calibration.plan import plan
from vit_export.export.program import PARITY, trace
from vit_export.export.targets import target_named
from vit_export.models import adapt
from vit_export.runtime.runner import open_runner

FLOOR_DB = 20
ONNX = target_named("onnx")
# Building is what costs time: the default run does the hardest size of each family, the slow run all four.
_SIZES = [
    "nonsquare",
    *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("native", "larger", "smaller")),
]
# One family for each way to carry positions; the slow run quantises all.
_QUICK = {
    "timm deit distilled", "hf dinov2 registers", "timm dinov3", "hf pvt", "timm pvt_v2", "timm swin",
    "timm beit", "torchvision vit", "user module",
}  # fmt: skip
_INT8 = [f if f in _QUICK else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]


@cache
def traced(family: str, kind: str) -> tuple[LoadedModel, Program]:
    """The adapted module and its program, which `trace` has compared with it."""
    model = adapt(FAMILIES[family].load(), FAMILIES[family].sizes()[kind])
    return model, trace(model)


def build(folder: Path, family: str, kind: str, precision: Precision) -> BuiltArtifact:
    model, program = traced(family, kind)
    request = BuildRequest(precision=precision, folder=folder, preprocessing=model.preprocessing)
    if precision is Precision.FP32:
        return export(program, None, ONNX, request)
    ranges = calibrate(program, [images(model.image_size, 32, seed=2).numpy()], MinMaxConfig())
    return export(program, plan(ranges, program.layers), ONNX, request)


def answers(artifact: BuiltArtifact, model: LoadedModel, batch: int) -> tuple[Logits, Logits]:
    """What the adapted PyTorch module and the file say to the same seeded images."""
    given = images(model.image_size, batch, seed=1)
    with torch.no_grad():
        reference: Logits = model.module(given).numpy()
    with open_runner(ONNX.runnable(artifact, 1)) as runner:
        return reference, runner.infer(given.numpy())


@pytest.mark.parametrize("kind", _SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_computes_what_the_adapted_module_does(family: str, kind: str, tmp_path: Path) -> None:
    """Within 1e-4 of the largest value at another batch; nothing is resized and only the batch is free."""
    model, program = traced(family, kind)
    artifact = build(tmp_path, family, kind, Precision.FP32)
    reference, result = answers(artifact, model, batch=3)
    assert program.dynamic_batch
    assert np.abs(reference - result).max() < PARITY * np.abs(reference).max()
    graph = onnx.load(artifact.path).graph
    assert not {node.op_type for node in graph.node} & {"Resize", "Upsample", "If", "Loop", "NonZero"}
    free = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    assert free == "batch"
    values = (*graph.input, *graph.output, *graph.value_info)
    open_sides = {
        (axis, side.dim_param)
        for value in values
        for axis, side in enumerate(value.type.tensor_type.shape.dim)
        if not side.HasField("dim_value")
    }
    # `16*batch` are the windows of a batch. onnx forgets the name behind some of torchvision's windows, which
    # are on the first axis; an open side of any other name or axis would not be the batch.
    assert {name.rpartition("*")[2] for axis, name in open_sides if name or axis} == {free}


@pytest.mark.parametrize("family", _INT8)
def test_int8_keeps_its_signal_at_a_size_that_is_not_native(family: str, tmp_path: Path) -> None:
    """The quantised file in ONNX Runtime is within 20 dB SQNR of the family's own FP32, and is integer."""
    model, _ = traced(family, "nonsquare")
    assert model.image_size != model.source_image_size
    artifact = build(tmp_path, family, "nonsquare", Precision.INT8)
    reference, result = answers(artifact, model, batch=16)
    sqnr_db = 10 * np.log10(np.square(reference).sum() / np.square(reference - result).sum())
    assert sqnr_db > FLOOR_DB
    assert artifact.details["integer_linears"] > 0
