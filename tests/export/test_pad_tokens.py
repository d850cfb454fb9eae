"""More tokens than the model has, wide products cut: the same numbers in shapes that threads share evenly."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from contracts.families import FAMILIES, images
from vit_export.artifacts import Program
from vit_export.export.blocks import WIDE, equal_rows, narrow_parts, row_time
from vit_export.export.graph import aten
from vit_export.export.layers import Shapes
from vit_export.export.pad_tokens import pad_tokens
from vit_export.export.program import relative_difference, trace

ATTENTION = aten.scaled_dot_product_attention.default


def operators(program: Program) -> Counter[object]:
    return Counter(node.target for node in program.graph.graph.nodes if node.op == "call_function")


def rows(program: Program) -> Counter[int]:
    """Tokens of the linears over [batch, tokens, channels]."""
    shapes = Shapes(program.graph)(images(program.image_size, 1))[1]
    return Counter(shapes[layer.node][1] for layer in program.layers if len(shapes[layer.node]) == 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_the_same_over_more_tokens(family: str) -> None:
    """With three rows more, whatever the family does with its tokens: biases, classes, windows, pooling."""
    program = trace(FAMILIES[family].load())
    padded = pad_tokens(program, lambda count: count + 3)
    given = images(program.image_size, program.batch_size if not program.dynamic_batch else 2)
    with torch.inference_mode():
        assert relative_difference(program.graph(given), padded.graph(given)) < 1e-5


@pytest.mark.parametrize("family", ["timm vit", "hf vit", "timm beit", "hf dinov2", "timm deit distilled"])
def test_tokens_are_padded_once(family: str) -> None:
    """One Pad in front; all linears over the tokens are longer, and attention has as many keys as before."""
    program = trace(FAMILIES[family].load())
    padded = pad_tokens(program, lambda count: count + 3)
    most = rows(program).most_common(1)[0][0]
    assert rows(padded)[most + 3] == rows(program)[most] and not rows(padded)[most]
    assert (operators(padded) - operators(program))[aten.pad.default] == 1
    assert operators(padded)[ATTENTION] == operators(program)[ATTENTION]
    shapes = Shapes(padded.graph)(images(program.image_size, 1))[1]
    calls = [n for n in padded.graph.graph.nodes if n.target is ATTENTION]
    assert {shapes[n.args[1].name][-2] for n in calls} == {most}


def test_nothing_changes_without_a_gain() -> None:
    """17 tokens are as good as 18: the very program comes back."""
    program = trace(FAMILIES["timm vit"].load())
    assert pad_tokens(program) is program


@pytest.mark.parametrize(
    ("tokens", "better"), [(197, 203), (257, 260), (196, 196), (256, 256), (50, 50), (577, 577), (1370, 1370)]
)
def test_counts_of_common_models(tokens: int, better: int) -> None:
    """Patches of 16 or 14 at 224 gain a fifth; grids without class token are even; long ones gain little."""
    assert equal_rows(tokens) == better


@given(st.integers(1, 3000), st.integers(1, 100))
def test_a_shape_never_costs_more(tokens: int, blocks: int) -> None:
    """More rows only where they take less time; parts are equal, and narrow enough to be worth it."""
    chosen = equal_rows(tokens)
    assert tokens <= chosen <= tokens + max(8, tokens // 20)
    assert chosen == tokens or row_time(chosen) < row_time(tokens)
    parts = narrow_parts(chosen, blocks * 64)
    assert blocks * 64 % parts == 0
    if parts > 1:
        assert -(-chosen // 64) * -(-blocks // parts) <= WIDE < -(-chosen // 64) * blocks
