"""Quantisation parameters cover what they must, and the quantised program is close to the float one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from contracts.small import small_vit
from vit_export.artifacts import LayerPlan, Program, QuantPlan, Range, TargetProfile
from vit_export.calibration.collect import calibrate
from vit_export.calibration.observers import MinMaxConfig
from vit_export.calibration.plan import plan
from vit_export.errors import UsageError
from vit_export.export.program import trace
from vit_export.export.quantize import activation_qparams, quantize, quantize_weight

ASYMMETRIC = TargetProfile("asymmetric", 20, "decomposed")
SYMMETRIC = TargetProfile("symmetric", 20, "decomposed")
bounds = st.floats(-1e30, 1e30, allow_nan=False)


@given(bounds, bounds, st.sampled_from([ASYMMETRIC, SYMMETRIC]))
def test_activation_grid_covers_the_range_and_zero(a: float, b: float, profile: TargetProfile) -> None:
    """Zero is on the grid, and both ends of the range are at most one step outside of it."""
    seen = Range(min(a, b), max(a, b))
    q = activation_qparams(seen, profile)
    assert q.low <= q.zero_point <= q.high and np.isfinite(q.scale) and q.scale > 0
    low, high = ((limit - q.zero_point) * q.scale for limit in (q.low, q.high))
    assert low - q.scale <= min(seen.low, 0) and max(seen.high, 0) <= high + q.scale


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-40])
@pytest.mark.parametrize("profile", [ASYMMETRIC, SYMMETRIC])
def test_ranges_without_extent_give_valid_scales(value: float, profile: TargetProfile) -> None:
    """All-zero and denormal ranges give a scale whose reciprocal is finite in float32."""
    q = activation_qparams(Range(-value, value), profile)
    assert np.isfinite(np.float32(1) / np.float32(q.scale))


@given(st.integers(0, 2**32 - 1), st.sampled_from([4, 8]))
def test_weights_are_within_half_a_step(seed: int, bits: int) -> None:
    """Every weight is stored within half a step of its channel; zero channels stay zero."""
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(seed)) * 10
    weight[2] = 0
    stored, scale = quantize_weight(weight, bits)
    assert stored.dtype is torch.int8 and int(stored.abs().max()) <= 2 ** (bits - 1) - 1
    error = (stored * scale[:, None] - weight).abs()
    assert bool((error <= scale[:, None] * 0.5001).all()) and not stored[2].any()


@pytest.fixture(scope="module")
def program() -> Program:
    """A traced two-block ViT."""
    return trace(small_vit())


@pytest.fixture(scope="module")
def plain(program: Program) -> QuantPlan:
    """Min-max over two batches."""
    images = np.random.default_rng(0).standard_normal((2, 8, 3, 32, 32), np.float32)
    return plan(calibrate(program, images, MinMaxConfig()), program.layers)


def _sqnr(program: Program, quantised: Program) -> float:
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        reference, other = program.graph(images), quantised.graph(images)
    return float(10 * torch.log10(reference.square().sum() / (reference - other).square().sum()))


def test_int8_is_close_and_four_bits_are_worse(program: Program, plain: QuantPlan) -> None:
    """Asymmetric int8 keeps 25 dB on a small random ViT; four-bit weights really change the numbers."""
    assert _sqnr(program, quantize(program, plain, ASYMMETRIC)) > 25
    four = QuantPlan("minmax", 0, 16, tuple(LayerPlan(p.name, True, p.input, 4) for p in plain.layers))
    assert 0 < _sqnr(program, quantize(program, four, ASYMMETRIC)) < 15


def test_weights_are_stored_once_as_int8(program: Program, plain: QuantPlan) -> None:
    """Quantised weights are int8 buffers under their own names; the source program keeps its floats."""
    quantised = quantize(program, plain, ASYMMETRIC)
    assert dict(quantised.graph.named_buffers())["blocks.0.mlp.fc1.weight"].dtype is torch.int8
    assert dict(program.graph.named_parameters())["blocks.0.mlp.fc1.weight"].dtype is torch.float32


def test_kept_layers_stay_float(program: Program, plain: QuantPlan) -> None:
    """A layer the plan keeps float has no pair, and convolutions follow the profile."""
    layers = tuple(LayerPlan(p.name, p.name != "head", p.input) for p in plain.layers)
    profile = TargetProfile("symmetric", 20, "decomposed", convolutions="float")
    names = dict(quantize(program, QuantPlan("x", 0, 1, layers), profile).graph.named_parameters())
    assert "head.weight" in names and "patch_embed.proj.weight" in names


def test_a_plan_of_another_model_is_refused(program: Program) -> None:
    """Layers the program does not have are named."""
    wrong = QuantPlan("minmax", 0, 1, (LayerPlan("encoder.fc", True, Range(0, 1)),))
    with pytest.raises(UsageError, match=r"does not have: encoder\.fc"):
        quantize(program, wrong, ASYMMETRIC)


def test_a_plan_without_a_range_is_refused(program: Program) -> None:
    """A layer that is to be quantised needs a range."""
    wrong = QuantPlan("minmax", 0, 1, (LayerPlan("head", True),))
    with pytest.raises(UsageError, match="no input range"):
        quantize(program, wrong, ASYMMETRIC)


def test_layers_that_share_an_input_share_its_pair() -> None:
    """Query, key and value linears fed by one tensor cost one quantise node."""
    from torch import nn

    from contracts.small import loaded, randomise

    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(48, 8) for _ in range(3))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            x = images.flatten(1)
            return self.q(x) + self.k(x) * self.v(x)

    program = trace(loaded(randomise(Three()), (4, 4), classes=8))
    layers = tuple(LayerPlan(layer.name, True, Range(-3, 3)) for layer in program.layers)
    quantised = quantize(program, QuantPlan("x", 0, 1, layers), ASYMMETRIC)
    pairs = [n for n in quantised.graph.graph.nodes if "quantize_per_tensor" in str(n.target)]
    assert len(pairs) == 2  # one quantise, one dequantise
