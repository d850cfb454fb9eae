"""Turned streams and heads: the same function in every family, with no channel that stands out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.families import FAMILIES, images
from contracts.small import small_vit
from vit_export.calibration.collect import channel_statistics
from vit_export.export.graph import aten
from vit_export.export.layers import constant
from vit_export.export.program import relative_difference, trace
from vit_export.export.rotate import keeping_ones, orthogonal, rotate
from vit_export.export.streams import find_streams

# Post-norm blocks write LayerNorms' outputs into their stream; transformers' DINOv2 classifier reads the mean
# of normed patches beside the class token, whose turning back costs too much in so small a model.
WITHOUT_STREAM = {"timm swinv2", "hf swinv2", "torchvision swin_v2", "hf dinov2"}


@pytest.mark.parametrize("family", FAMILIES)
def test_turned_families_answer_the_same(family: str) -> None:
    """All streams and heads turned, in float: outputs differ by rounding alone; layers keep their names."""
    program = trace(FAMILIES[family].load())
    turned = rotate(program)
    assert turned.heads > 0 and (turned.streams > 0) is (family not in WITHOUT_STREAM)
    assert [layer.name for layer in turned.program.layers] == [layer.name for layer in program.layers]
    fresh = images(program.image_size, 2, seed=2)
    with torch.inference_mode():
        assert relative_difference(program.graph(fresh), turned.program.graph(fresh)) < 1e-5


def test_a_vit_is_one_stream_without_another_operator() -> None:
    """Embedding, tables, projections and MLPs write it, five norms read it; the graph gets no node more."""
    program = trace(small_vit())
    (stream,) = find_streams(program)
    writers = {str(w.args[1].target if w.op == "call_function" else w.target) for w in stream.writers}  # type: ignore[union-attr]
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight"} < writers and len(writers) == 3 + 2 * 2
    assert len(stream.norms) == 5 and not stream.others and stream.sound
    before, after = (
        [n.target for n in p.graph.graph.nodes if n.op == "call_function"]
        for p in (program, rotate(program).program)
    )
    assert before == after


def test_a_planted_outlier_is_spread() -> None:
    """A channel a hundred times as large as the others hardly shows in what the linears then read."""
    model = small_vit()
    model.module.blocks[0].norm1.weight.data[3] *= 100  # type: ignore[union-attr, index]
    program = trace(model)
    pictures = [images((32, 32), 8).numpy()]
    spread = []
    for one in (program, rotate(program).program):
        peak = channel_statistics(one, pictures)["blocks.0.attn.qkv"].abs_max()
        spread.append(float(peak.max() / peak.mean()))
    assert spread[0] > 20 and spread[1] < 3


def test_another_reader_gets_the_stream_as_it_was() -> None:
    """Where a program returns normed tokens, one product turns them back, on the token that is read."""
    program = trace(small_vit(num_classes=0))
    turned = rotate(program)
    products = [
        sum(n.target is aten.linear.default for n in p.graph.graph.nodes) for p in (program, turned.program)
    ]
    assert turned.streams == 1 and products[1] == products[0] + 1
    assert len(turned.program.layers) == len(program.layers)  # it stays float, and is not a layer of the plan


def test_the_same_seed_turns_alike() -> None:
    """Plans and artifacts stay reproducible; another seed is another matrix."""
    program = trace(small_vit())
    weights = [
        constant(rotate(program, seed).program.graph, "blocks.0.attn.qkv.weight") for seed in (0, 0, 1)
    ]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 70), st.integers(0, 5))
def test_matrices_are_orthogonal_and_keep_ones(size: int, seed: int) -> None:
    """Q Qᵀ = 1 for both kinds; the one for streams leaves the vector of ones alone, as LayerNorm needs it."""
    generator = torch.Generator().manual_seed(seed)
    ones = torch.ones(size, dtype=torch.float64)
    for matrix in (orthogonal(size, generator), keeping_ones(size, generator)):
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(matrix @ ones, ones)
