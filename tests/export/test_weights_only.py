"""Quantising weights alone: what each runtime then computes is the plan's program in PyTorch."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from contracts.small import small_vit
from vit_export.artifacts import BuildRequest, Precision, Preprocessing, Program, QuantPlan, WeightsOnly
from vit_export.calibration.collect import calibrate, watch
from vit_export.calibration.correlation import Correlation
from vit_export.calibration.observers import MinMaxConfig
from vit_export.calibration.plan import GROUP
from vit_export.calibration.plan import plan as make_plan
from vit_export.errors import UsageError
from vit_export.export.coreml_graph import float_groups, float_weights
from vit_export.export.coreml_options import CoreMLOptions
from vit_export.export.fake_quant import fake_quantized
from vit_export.export.program import trace
from vit_export.export.quantize import quantize, weight_scale
from vit_export.export.rounding import round_weights
from vit_export.export.targets import target_named
from vit_export.job import ExportJob
from vit_export.runtime.accuracy import sqnr_db
from vit_export.runtime.coreml_interpreter import Interpreter
from vit_export.runtime.runner import open_runner

KINDS: tuple[WeightsOnly, ...] = ("int8", "int4")
CONTRACT = Preprocessing((32, 32))
IMAGES = np.random.default_rng(0).standard_normal((8, 3, 32, 32)).astype(np.float32)


@cache
def program() -> Program:
    return trace(small_vit(embed_dim=64, num_heads=2))


@cache
def plan(kind: WeightsOnly) -> QuantPlan:
    ranges = calibrate(program(), [IMAGES], MinMaxConfig())
    return make_plan(ranges, program().layers, weights=kind, keep_float=["head"])


@torch.inference_mode()
def in_torch(quantised: Program) -> np.ndarray:
    found: np.ndarray = fake_quantized(quantised)(torch.from_numpy(IMAGES)).numpy()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_says_bits_and_groups(kind: WeightsOnly) -> None:
    """Linears have eight bits a row or four a group of columns; what is kept float stays so."""
    wanted = (8, 0) if kind == "int8" else (4, GROUP)
    linears = {layer.name for layer in program().layers if layer.kind == "linear"} - {"head"}
    for layer in plan(kind).layers:
        if layer.name in linears:
            assert (layer.weight_bits, layer.group) == wanted
    assert plan(kind).weights_only and plan(kind).kept_float() == ("head",)


def test_scales_of_groups() -> None:
    """Each group's largest magnitude is the largest code."""
    weight = torch.tensor([[1.0, -7.0, 14.0, 0.0]])
    assert weight_scale(weight, 4, 2).tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_runtimes_compute_the_plan(name: str, kind: WeightsOnly, tmp_path: Path) -> None:
    """Every planned product reads stored codes, and the artifact is as far from float as the plan in PyTorch.

    Activations are quantised in blocks while it runs, which alone costs 35 dB and more.
    """
    target = target_named(name)
    options = {"weights": kind}
    quantised = quantize(program(), plan(kind), target.profile(Precision.INT8, options))
    built = target.build(quantised, BuildRequest(Precision.INT8, tmp_path, CONTRACT, options=options))
    linears = [p for p in plan(kind).layers if p.quantized and p.name != "patch_embed.proj"]
    assert built.details["weight_products"] == len(linears)
    assert target.notes(built)[0].startswith(f"only weights are stored quantised ({kind})")
    with open_runner(target.runnable(built, 1)) as runner:
        said = runner.infer(IMAGES)
    loss = sqnr_db(in_torch(quantised), said)
    assert loss is None or loss > 30


@pytest.mark.parametrize("kind", KINDS)
def test_core_ml_stores_the_plan(kind: WeightsOnly, tmp_path: Path) -> None:
    """Eight bits a channel, or four in blocks: the package decompresses to the plan's weights."""
    target, options = target_named("coreml"), {"weights": kind}
    quantised = quantize(program(), plan(kind), target.profile(Precision.INT8, options))
    built = target.build(quantised, BuildRequest(Precision.INT8, tmp_path, CONTRACT, options=options))
    stored = Interpreter(built.path).decompressed.values()
    planned = [p.name for p in plan(kind).layers if p.quantized]
    assert built.details["compressed_weights"] == len(planned) == len(stored)
    weights = float_weights(float_groups(quantised)[0]).graph.state_dict()
    ours = sorted((weights[f"{name}.weight"].numpy() for name in planned), key=_order)
    for mine, theirs in zip(ours, sorted(stored, key=_order), strict=True):
        np.testing.assert_allclose(theirs, mine, atol=2e-3 * np.abs(mine).max())  # scales are float16


def _order(weight: np.ndarray) -> tuple[object, ...]:
    return weight.shape, float(weight.flat[np.abs(weight).argmax()])


def test_four_bits_lose_less_with_gptq() -> None:
    """Errors that cancel on the layer's own inputs: the same grid, a network nearer to float."""
    seen = watch(program(), [IMAGES], lambda layer: Correlation())[0]
    rounded = round_weights(program(), plan("int4"), seen)
    profile = target_named("onnx").profile(Precision.INT8, {})
    exact = program().graph(torch.from_numpy(IMAGES)).detach().numpy()
    nearest, gptq = (
        sqnr_db(exact, in_torch(quantize(one, plan("int4"), profile))) for one in (program(), rounded)
    )
    assert nearest is not None and gptq is not None and gptq > nearest + 1


def test_a_target_without_gain_refuses(tmp_path: Path) -> None:
    """TensorRT runs int8 only with quantised activations: the error says what to leave out."""
    target, request = target_named("tensorrt"), BuildRequest(Precision.INT8, tmp_path, CONTRACT)
    with pytest.raises(UsageError, match="leave --weights out"):
        target.build(program(), replace(request, options={"weights": "int8"}))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": "int4", "palettize": 4}, "give one of them"),
        ({"weights": "int4", "coreml_target": "iOS17"}, "iOS18"),
        ({"weights": "int2"}, "int8, int4"),
    ],
)
def test_what_core_ml_cannot_store(options: dict[str, object], words: str) -> None:
    """Two ways at once, four-bit blocks before iOS 18, and unknown kinds are refused with what to do."""
    with pytest.raises(UsageError) as error:
        CoreMLOptions.of(options)
    assert words in str(error.value)


def test_an_unknown_kind_is_refused() -> None:
    """A job says which kinds there are before anything is loaded."""
    with pytest.raises(UsageError, match="int8 or int4"):
        _ = ExportJob(options={"weights": "int2"}).weights
