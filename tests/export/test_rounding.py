"""Second-order rounding, bias correction and what a search writes down are what they claim to be."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.small import small_vit
from vit_export.artifacts import Program, QuantPlan, Range, TargetProfile
from vit_export.calibration.collect import calibrate, watch
from vit_export.calibration.correlation import Correlation
from vit_export.calibration.observers import MinMaxConfig
from vit_export.calibration.plan import plan
from vit_export.export.bias import correct_biases
from vit_export.export.fake_quant import fake_quantized
from vit_export.export.layers import constant
from vit_export.export.program import trace
from vit_export.export.quantize import activation_qparams, quantize, weight_scale
from vit_export.export.rounding import gptq, inverse_factor, round_weights

ASYMMETRIC = TargetProfile("asymmetric", 20, "decomposed")
SYMMETRIC = TargetProfile("symmetric", 20, "decomposed")


@pytest.fixture(scope="module")
def program() -> Program:
    """A traced two-block ViT."""
    return trace(small_vit())


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    """Four batches of eight."""
    return list(np.random.default_rng(0).standard_normal((4, 8, 3, 32, 32), np.float32))


@pytest.fixture(scope="module")
def plain(program: Program, pictures: list[np.ndarray]) -> QuantPlan:
    """Min-max."""
    return plan(calibrate(program, pictures, MinMaxConfig()), program.layers)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.sampled_from([4, 8]))
def test_gptq_stays_on_the_grid_and_beats_nearest(seed: int, bits: int) -> None:
    """Every value is a code times its row's scale; on correlated inputs the output error is smaller."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(12, 40, generator=generator)
    inputs = torch.randn(400, 6, generator=generator) @ torch.randn(6, 40, generator=generator)
    inputs += 0.05 * torch.randn(400, 40, generator=generator)
    scale = weight_scale(weight, bits)
    rounded = gptq(weight, scale, inverse_factor(inputs.T @ inputs), bits)
    codes = rounded / scale[:, None]
    assert torch.allclose(codes, codes.round(), atol=1e-3) and codes.abs().max() <= 2 ** (bits - 1) - 0.5
    nearest = (weight / scale[:, None]).round() * scale[:, None]
    errors = [float((inputs @ (w - weight).T).square().mean()) for w in (rounded, nearest)]
    assert errors[0] < errors[1]


def test_rounded_weights_survive_quantisation(
    program: Program, plain: QuantPlan, pictures: list[np.ndarray]
) -> None:
    """What GPTQ chose is what the quantised program stores, code by code."""
    linears = tuple(layer for layer in program.layers if layer.kind == "linear")
    seen = watch(replace(program, layers=linears), pictures, lambda layer: Correlation())[0]
    rounded = round_weights(program, plain, seen)
    stored = quantize(rounded, plain, ASYMMETRIC).graph
    for layer in linears:
        values, codes = (constant(graph, layer.weight) for graph in (rounded.graph, stored))
        scale = rounded.weight_scales[layer.weight]
        assert torch.equal(codes.float(), (values / scale[:, None]).round())


@pytest.mark.parametrize("profile", [ASYMMETRIC, SYMMETRIC])
def test_fake_quantised_equals_the_pairs(program: Program, plain: QuantPlan, profile: TargetProfile) -> None:
    """One kernel in the place of Q and DQ gives the same outputs, but for ties."""
    quantised = quantize(program, plain, profile)
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        one, other = quantised.graph(images), fake_quantized(quantised)(images)
    assert float((one - other).abs().max() / one.abs().max()) < 2e-2
    assert float((one - other).square().mean() / one.square().mean()) < 1e-4


def test_corrected_biases_cancel_the_mean_error(
    program: Program, plain: QuantPlan, pictures: list[np.ndarray]
) -> None:
    """With one layer in three bits, the mean error of the outputs it feeds all but disappears."""
    one = program.layers[-1].name  # the head: what it gives is what the network gives
    coarse = replace(
        plain,
        layers=tuple(replace(p, weight_bits=3, quantized=p.name == one) for p in plain.layers),
    )
    quantised = fake_quantized(quantize(program, coarse, ASYMMETRIC))
    corrected = correct_biases(program, program, quantised, pictures)
    images = torch.from_numpy(np.concatenate(pictures))
    with torch.inference_mode():
        reference = program.graph(images).mean(0)
        errors = [
            float((fake_quantized(quantize(p, coarse, ASYMMETRIC))(images).mean(0) - reference).norm())
            for p in (corrected, program)
        ]
    assert errors[0] < errors[1] / 100


@given(st.floats(-1e4, 1e4), st.floats(1e-3, 1e4))
def test_centred_symmetric_grid_covers_the_range(low: float, extent: float) -> None:
    """With a shift, a target without zero points covers a one-sided range with at most 1.12 of its extent."""
    seen = Range(low, low + extent)
    q = activation_qparams(seen, SYMMETRIC, centre=True)
    reach = 127 * q.scale * (1 + 1e-6)
    assert q.zero_point == 0 and q.shift - reach <= min(seen.low, 0) and max(seen.high, 0) <= q.shift + reach
    whole = max(seen.high, 0) - min(seen.low, 0)
    assert 2 * 127 * q.scale <= whole * (1.12 if q.shift else 2.001) + 1e-2 * abs(q.shift)


def test_symmetric_targets_lose_little_to_asymmetric_ones(program: Program, plain: QuantPlan) -> None:
    """GELU's one-sided outputs are centred, so both profiles are within 1.5 dB of each other."""
    images = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        reference = program.graph(images)
        noise = [
            float((quantize(program, plain, p).graph(images) - reference).square().mean())
            for p in (SYMMETRIC, ASYMMETRIC)
        ]
    assert 10 * np.log10(noise[0] / noise[1]) < 1.5
