"""Every family as a saved Core ML package, against PyTorch, through the reference interpreter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers as tr
from torch import nn

from contracts.small import loaded, randomise
from vit_export.artifacts import BuildRequest, LoadedModel, Precision, Program, QuantPlan
from vit_export.calibration.collect import calibrate
from vit_export.calibration.observers import MinMaxConfig
from vit_export.calibration.plan import plan as make_plan
from vit_export.export.program import trace
from vit_export.export.quantize import quantize
from vit_export.export.targets.coreml_package import CoreMLTarget
from vit_export.models import adapt
from vit_export.runtime.accuracy import sqnr_db
from vit_export.runtime.runner import open_runner

TARGET = CoreMLTarget()
FP16, FP32, INT8 = Precision.FP16, Precision.FP32, Precision.INT8


class Logits(nn.Module):
    """The logits of a transformers classifier."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """float32 NCHW to [N, K]."""
        result: torch.Tensor = self.model(images).logits
        return result


def of_timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    settings = {"num_classes": 10, **options}
    return lambda: timm.create_model(name, **settings)


def of_hf(kind: str, **options: Any) -> Callable[[], nn.Module]:
    config, model = getattr(tr, f"{kind}Config"), getattr(tr, f"{kind}ForImageClassification")
    return lambda: Logits(model(config(num_labels=10, **options)))


PLAIN = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 48, "num_heads": 3}
HF = {"image_size": 32, "patch_size": 8, "hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3}
SWIN = {"embed_dim": 24, "depths": (2,), "num_heads": (2,), "window_size": 7}  # plain and shifted
PVT = {
    "depths": [1, 1],
    "hidden_sizes": [16, 32],
    "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 2],
    "patch_sizes": [4, 2],
    "strides": [4, 2],
    "sequence_reduction_ratios": [4, 1],
}
FAMILIES: dict[str, tuple[Callable[[], nn.Module], tuple[int, int]]] = {
    "ViT": (of_timm("vit_tiny_patch16_224", **PLAIN), (32, 32)),
    "DeiT distilled": (of_timm("deit_tiny_distilled_patch16_224", **PLAIN), (32, 32)),
    "DINOv2": (of_timm("vit_small_patch14_dinov2", **PLAIN | {"img_size": 56, "patch_size": 14}), (56, 56)),
    "BEiT": (of_timm("beit_base_patch16_224", **PLAIN), (32, 32)),
    "Swin": (of_timm("swin_tiny_patch4_window7_224", img_size=56, **SWIN), (56, 56)),
    "PVTv2": (
        of_timm("pvt_v2_b0", depths=[1, 1], embed_dims=[16, 32], num_heads=[1, 2], sr_ratios=[8, 4]),
        (64, 64),
    ),
    "HF ViT": (of_hf("ViT", intermediate_size=96, **HF), (32, 32)),
    "HF DeiT": (of_hf("DeiT", intermediate_size=96, **HF), (32, 32)),
    "HF DINOv2": (of_hf("Dinov2", mlp_ratio=2, **HF), (32, 32)),
    "HF BEiT": (of_hf("Beit", intermediate_size=96, use_relative_position_bias=True, **HF), (32, 32)),
    "HF Swin": (
        of_hf("Swin", image_size=56, embed_dim=24, depths=[2], num_heads=[2], window_size=7),
        (56, 56),
    ),
    "HF PVT": (of_hf("Pvt", image_size=32, num_encoder_blocks=2, **PVT), (32, 32)),
}
OTHER_SIZES = {"ViT": (48, 32), "DeiT distilled": (24, 40), "DINOv2": (70, 42), "PVTv2": (96, 64)}
CASES = [(name, None) for name in FAMILIES] + list(OTHER_SIZES.items())
QUICK = ("Swin", "HF BEiT")  # every conversion path; the default run has the others in one precision


def sample(*, all_families: bool = False) -> list[Any]:
    """Parameters: native sizes of QUICK or of all families; the rest of CASES is marked slow."""
    quick = [size is None and (all_families or name in QUICK) for name, size in CASES]
    return [
        pytest.param(*case, marks=[] if q else pytest.mark.slow) for case, q in zip(CASES, quick, strict=True)
    ]


@cache
def model(name: str, size: tuple[int, int] | None) -> LoadedModel:
    """Randomised, so that every block contributes; at its native size or another."""
    make, native = FAMILIES[name]
    torch.manual_seed(0)
    source = loaded(randomise(make()), native, spec=name)
    return source if size is None else adapt(source, size)


@cache
def program(name: str, size: tuple[int, int] | None) -> Program:
    return trace(model(name, size))


@cache
def plan(name: str, size: tuple[int, int] | None) -> QuantPlan:
    traced = program(name, size)
    return make_plan(calibrate(traced, [images(name, size, seed=1)], MinMaxConfig()), traced.layers)


def images(name: str, size: tuple[int, int] | None, seed: int = 0) -> Any:
    shape = (12, 3, *(size or FAMILIES[name][1]))
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def in_torch(module: nn.Module, batch: Any) -> Any:
    with torch.inference_mode():
        return module(torch.from_numpy(batch)).numpy()


def packaged(source: Program, precision: Precision, folder: Path, batch: Any, **options: Any) -> Any:
    """Outputs of the package built from `source`, and what the build says of itself."""
    contract = loaded(nn.Identity(), source.image_size).preprocessing
    request = BuildRequest(precision, folder, contract, options=options)
    artifact = TARGET.build(source, request)
    with open_runner(TARGET.runnable(artifact, 1)) as runner:
        return runner.infer(batch), artifact.details


def relative(reference: Any, result: Any) -> float:
    return float(np.abs(reference - result).max() / np.abs(reference).max())


def check_float(name: str, size: Any, precision: Precision, limit: float, folder: Path) -> None:
    batch = images(name, size)[:4]
    reference = in_torch(model(name, size).module, batch)
    result, _ = packaged(program(name, size), precision, folder, batch)
    assert reference.std(0).min() > 1e-3 * reference.std(), "the model ignores its input"
    assert relative(reference, result) < limit


@pytest.mark.parametrize(("name", "size"), sample())
def test_fp16_within_its_rounding(name: str, size: Any, tmp_path: Path) -> None:
    """The FP16 package is within 5e-3 of PyTorch, at the native size and at another."""
    check_float(name, size, FP16, 5e-3, tmp_path)


@pytest.mark.parametrize(
    ("name", "size"),
    [pytest.param(*case, marks=[] if i in (0, 4, 9) else pytest.mark.slow) for i, case in enumerate(CASES)],
)
def test_fp32_is_pytorch(name: str, size: Any, tmp_path: Path) -> None:
    """The FP32 package is within 1e-5 of PyTorch."""
    check_float(name, size, FP32, 1e-5, tmp_path)


@pytest.mark.parametrize(("name", "size"), sample(all_families=True))
def test_w8a8_loses_what_the_plan_loses(name: str, size: Any, tmp_path: Path) -> None:
    """int8 weights and activations are within 1 dB of the same plan run in PyTorch, every linear integer."""
    batch = images(name, size)
    quantised = quantize(program(name, size), plan(name, size), TARGET.profile(INT8, {}))
    reference = in_torch(model(name, size).module, batch)
    result, details = packaged(quantised, INT8, tmp_path, batch)
    expected, reached = (sqnr_db(reference, x) for x in (in_torch(quantised.graph, batch), result))
    assert expected is not None and reached is not None
    assert reached > expected - 1
    assert expected > 15
    layers = program(name, size).layers
    assert details["weights"] == len(layers)
    assert details["float_weights"] == tuple(sorted(layer.name for layer in layers if layer.kind == "conv"))
    assert details["compressed_weights"] == sum(layer.kind == "linear" for layer in layers)


@pytest.mark.parametrize(
    ("name", "size"),
    [pytest.param(*case, marks=[] if i in (0, 4, 9) else pytest.mark.slow) for i, case in enumerate(CASES)],
)
def test_int8_weights_keep_30_db(name: str, size: Any, tmp_path: Path) -> None:
    """int8 weights alone, one scale an output channel, keep at least 30 dB."""
    batch = images(name, size)
    alone = replace(plan(name, size), weights_only=True)
    quantised = quantize(program(name, size), alone, TARGET.profile(INT8, {"weights": "int8"}))
    result, details = packaged(quantised, INT8, tmp_path, batch, weights="int8")
    loss = sqnr_db(in_torch(model(name, size).module, batch), result)
    assert loss is not None and loss > 30
    assert details["compressed_weights"] == details["weights"]
