"""Integer products in parts, and single queries asked of the tokens, give what the whole gives."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.fx import Node

from contracts.families import FAMILIES, images
from vit_export.artifacts import Program, TargetProfile, WeightsOnly
from vit_export.calibration.collect import calibrate
from vit_export.calibration.observers import MinMaxConfig
from vit_export.calibration.plan import plan
from vit_export.export.graph import Edit, aten, like_its_input
from vit_export.export.program import relative_difference, trace
from vit_export.export.quantize import DEQUANTIZE, QUANTIZE, quantize
from vit_export.export.single_query import merge_single_query
from vit_export.export.split_products import split_wide_products

ATTENTION = aten.scaled_dot_product_attention.default
PROFILES = {"asymmetric": TargetProfile("asymmetric", 20, "decomposed"), "float": None}


def lowered(family: str, profile: TargetProfile | None, weights: WeightsOnly | None = None) -> Program:
    """A family's program, quantised by min-max of noise if there is a profile; maybe its weights alone."""
    program = trace(FAMILIES[family].load())
    if profile is None:
        return program
    batch = 4 if program.dynamic_batch else program.batch_size
    ranges = calibrate(program, [images(program.image_size, batch).numpy()], MinMaxConfig())
    return quantize(program, plan(ranges, program.layers, weights=weights), profile)


def calls(program: Program, target: object) -> list[Node]:
    return [node for node in program.graph.graph.nodes if node.target is target]


def difference(program: Program, other: Program) -> float:
    given = images(program.image_size, 2 if program.dynamic_batch else program.batch_size, seed=5)
    with torch.inference_mode():
        return relative_difference(program.graph(given), other.graph(given))


def halves(rows: int, channels: int) -> int:
    return 2 if channels % 2 == 0 else 1


@pytest.mark.parametrize("family", FAMILIES)
def test_products_in_halves_are_the_product(family: str) -> None:
    """Whatever stands behind a linear in a family: GELU, a gate, heads, windows, nothing.

    Without quantisers, which would make a step of a difference in the last bit.
    """
    program = lowered(family, PROFILES["asymmetric"], "int8")
    assert difference(program, split_wide_products(program, halves)) < 1e-5


def divided(program: Program) -> Program:
    """The program with a factor for each channel behind its GELUs, as a search divides outliers."""
    edit = Edit.of(program.graph)
    for gelu in edit.nodes(aten.gelu.default):
        factor = edit.constant("factor", torch.rand(gelu.meta["val"].shape[-1]) + 0.5, gelu.next)
        product = like_its_input(edit.call(factor.next, aten.mul.Tensor, gelu, factor))
        for user in set(gelu.users) - {product}:
            user.replace_input_with(gelu, product)
    return replace(program, graph=edit.build())


@pytest.mark.parametrize("outliers", [False, True])
def test_parts_are_joined_behind_their_quantiser(outliers: bool) -> None:
    """A block's first MLP product in two: two GELUs, two quantisers, and one Concat of eight bits a value."""
    program = lowered("timm vit", PROFILES["asymmetric"])
    program = divided(program) if outliers else program
    widest = max(layer.shape[0] for layer in program.layers if layer.kind == "linear")
    split = split_wide_products(program, lambda rows, channels: 2 if channels == widest and rows > 1 else 1)
    cuts = [node for node in calls(split, aten.cat.default) if node.args[1] == 2]
    counts = Counter(len(calls(split, t)) - len(calls(program, t)) for t in (aten.gelu.default, QUANTIZE))
    assert counts == {len(cuts): 2} and cuts and all(n.args[0][0].target is DEQUANTIZE for n in cuts)  # type: ignore[index, union-attr]
    assert difference(program, split) < 0.02  # a last bit may become a step
    assert split_wide_products(program, lambda *_: 1).graph.code == program.graph.code


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_the_same_with_merged_queries(family: str, profile: str) -> None:
    """Merged where a class token asks alone, untouched elsewhere: float, and with weights in eight bits."""
    program = lowered(family, PROFILES[profile], "int8")
    assert difference(program, merge_single_query(program)) < 1e-5


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("family", ["timm vit", "timm deit3", "hf vit", "hf deit"])
def test_the_last_block_makes_no_keys_and_values(family: str, profile: str) -> None:
    """One attention less; no linear over all tokens is left in the last block."""
    program = lowered(family, PROFILES[profile])
    merged = merge_single_query(program)
    assert len(calls(merged, ATTENTION)) == len(calls(program, ATTENTION)) - 1
    assert len(calls(merged, aten.linear.default)) <= len(calls(program, aten.linear.default))


@pytest.mark.parametrize("family", ["timm eva02", "timm swin", "timm deit distilled", "timm beit"])
def test_other_attention_stays(family: str) -> None:
    """Rotated keys, windows, two queries and a bias on the scores are left as they are."""
    program = lowered(family, None)
    assert len(calls(merge_single_query(program), ATTENTION)) == len(calls(program, ATTENTION))
