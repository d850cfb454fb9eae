"""Overflow of float16 is found in the traced program, by module path, and the artifact is built around it."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch

from contracts.small import small_vit
from vit_export.artifacts import BuildRequest, LoadedModel, Precision, Program
from vit_export.errors import NumericsError
from vit_export.export.half_range import half_overflows, overflow_words
from vit_export.export.half_stored import half_stored
from vit_export.export.peaks import run_graph
from vit_export.export.program import trace
from vit_export.export.targets import target_named

IMAGES = np.random.default_rng(0).standard_normal((3, 3, 32, 32)).astype(np.float32)


def loud() -> LoadedModel:
    """A ViT whose second MLP is a hundred thousand times too loud inside and right again at its end."""
    model = small_vit()
    with torch.no_grad():
        for linear, scale in (("fc1", 1e5), ("fc2", 1e-5)):
            getattr(model.module.blocks[1].mlp, linear).weight *= scale
    return model


@pytest.fixture(scope="module")
def program() -> Program:
    return trace(loud())


def test_the_module_is_named(program: Program) -> None:
    """Exactly the modules whose numbers float16 cannot hold, with their peaks; none in a quiet model."""
    found = half_overflows(program, IMAGES)
    assert set(found) == {"blocks.1.mlp.fc1", "blocks.1.mlp.act"}
    assert all(peak > 65504 for peak in found.values())
    assert "overflows in blocks.1.mlp.fc1 (" in overflow_words(found)
    assert not half_overflows(trace(small_vit()), IMAGES)


def test_onnx_keeps_what_would_overflow(program: Program, tmp_path: Path) -> None:
    """With images to look at, the fp16 file computes the loud layers in float32 and stays right."""
    target = target_named("onnx")
    contract = loud().preprocessing
    (tmp_path / "kept").mkdir()
    request = BuildRequest(Precision.FP16, tmp_path / "kept", contract, samples=IMAGES)
    kept = target.build(program, request)
    assert any("blocks.1.mlp" in name for name in kept.details["kept_float32"])
    with torch.no_grad():
        reference = program.graph(torch.from_numpy(IMAGES)).numpy()
    rounded = run_graph(kept.path, IMAGES, rounded=True)
    assert np.abs(rounded - reference).max() < 0.02 * np.abs(reference).max()


def test_stored_in_half_is_the_module_in_half() -> None:
    """Every tensor rounded to float16 is as far from float32 as torch's own float16 module, and near it."""
    model = small_vit()
    images, traced = torch.from_numpy(IMAGES), trace(model)
    with torch.inference_mode():
        exact, stored = traced.graph(images), half_stored(traced.graph)(images)
        own = deepcopy(model.module).half()(images.half()).float()
    error, theirs = (stored - exact).abs().max(), (own - exact).abs().max()
    assert 0 < error < 3 * theirs and stored.dtype is torch.float32


def test_what_half_cannot_hold_stays_float32(program: Program) -> None:
    """A layer whose results exceed 65504 does not become Inf: the answer stays right."""
    images = torch.from_numpy(IMAGES)
    with torch.inference_mode():
        exact, stored = program.graph(images), half_stored(program.graph)(images)
    assert (stored - exact).abs().max() < 0.02 * exact.abs().max()


def test_nan_in_float32_is_not_an_overflow(program: Program) -> None:
    """NaN that is there before any conversion is an error with the module's name."""
    broken = IMAGES.copy()
    broken[0, 0, 0, 0] = np.nan
    with pytest.raises(NumericsError, match=r"NaN first in patch_embed\.proj"):
        half_overflows(program, broken)
