"""Tokens that nobody reads are not computed, and what is read stays the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from contracts.families import FAMILIES, images
from contracts.small import loaded
from vit_export.artifacts import Program
from vit_export.export.graph import aten
from vit_export.export.layers import Shapes
from vit_export.export.program import relative_difference, trace


def _tokens(program: Program) -> dict[str, int]:
    """Tokens that reach each linear, by layer name."""
    shapes = Shapes(program.graph)(images(program.image_size, 1))[1]
    return {layer.name: shapes[layer.node][-2] for layer in program.layers if len(shapes[layer.node]) > 2}


@pytest.mark.parametrize(
    ("family", "kept"),
    [
        ("timm vit", 1),
        ("timm deit distilled", 2),
        ("hf dinov2 registers", 21),
        ("timm beit", 17),
        ("user module", 1),
    ],
)
def test_the_last_block_computes_what_is_read(family: str, kept: int) -> None:
    """One class token, two with distillation; all where the patches' mean or every token is read."""
    model = FAMILIES[family].load()
    program = trace(model)
    linears = [tokens for tokens in _tokens(program).values() if tokens != 1 or kept == 1]
    assert linears[-1] == kept
    given = images(model.image_size, 2, seed=3)
    with torch.inference_mode():
        assert relative_difference(model.module(given), program.graph(given)) < 1e-5


def test_keys_and_values_stay_whole() -> None:
    """The last attention has one query and every key; blocks before it are as they were."""
    program = trace(FAMILIES["timm vit"].load())
    shapes = Shapes(program.graph)(images(program.image_size, 1))[1]
    calls = [n for n in program.graph.graph.nodes if n.target is aten.scaled_dot_product_attention.default]
    assert [shapes[n.args[0].name][-2] for n in calls] == [17, 1]
    assert [shapes[n.args[1].name][-2] for n in calls] == [17, 17]


class _Reads(nn.Module):
    """Tokens through a linear and a LayerNorm; `read` says which come out."""

    def __init__(self, read: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch, self.fc, self.norm = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8), nn.LayerNorm(8)
        self.where, self.read = nn.Parameter(torch.randn(1, 16, 8)), read

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2) + self.where
        done: Tensor = self.norm(tokens + self.fc(tokens))
        if self.read == "last":
            return done[:, -1]
        if self.read == "first and third":
            return done[:, 0] + done[:, 2]
        if self.read == "every second":
            return done[:, ::2].mean(1)
        return done.mean(1) + (done[:, 0] if self.read == "one and mean" else 0)


@pytest.mark.parametrize(
    ("read", "kept"),
    [("last", 1), ("first and third", 3), ("every second", 16), ("mean", 16), ("one and mean", 16)],
)
def test_what_is_read_decides(read: str, kept: int) -> None:
    """The shortest run of tokens that has all that are read; tables of positions are cut with them."""
    module = _Reads(read)
    program = trace(loaded(module, (16, 16), classes=8))
    assert _tokens(program)["fc"] == kept
    given = torch.randn(3, 3, 16, 16)
    with torch.inference_mode():
        assert relative_difference(module(given), program.graph(given)) < 1e-5
