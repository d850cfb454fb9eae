"""Tracing finds every linear by its module path, counts its work and says what it cannot do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contracts.small import loaded, randomise, small_vit
from vit_export.artifacts import LoadedModel
from vit_export.errors import ParityError, TargetError
from vit_export.export.program import exported, relative_difference, trace


def test_layers_carry_module_paths_in_order() -> None:
    """Every linear and convolution is found under the name its module has in the user's model."""
    names = [layer.name for layer in trace(small_vit()).layers]
    block = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    assert names == ["patch_embed.proj", *(f"blocks.{i}.{n}" for i in (0, 1) for n in block), "head"]


def test_macs_are_those_of_the_formula() -> None:
    """MACs of one image: tokens x weights for linears, 2 N² C for attention; only what the class token needs
    behind the last block's keys and values."""
    program = trace(small_vit())
    tokens, width = 17, 48
    linears = (tokens * (3 + 1 + 4 + 4) + tokens * 3 + (1 + 4 + 4)) * width * width
    patch, head = 16 * 3 * 64 * width, width * 10
    assert program.attention_macs == 2 * (tokens + 1) * tokens * width
    assert program.macs == linears + patch + head + program.attention_macs


class Functional(nn.Module):
    """Linears that no nn.Linear calls: F.linear with a joined bias, and nn.MultiheadAttention."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(24, 12))
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(12)), nn.Parameter(torch.randn(12))
        self.attention = nn.MultiheadAttention(24, 2, batch_first=True)
        self.head = nn.Linear(24, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = images.flatten(2).transpose(1, 2).reshape(len(images), -1, 12)
        x = F.linear(x, self.weight, torch.cat([self.q_bias, self.v_bias]))
        x, _ = self.attention(x, x, x, need_weights=False)
        return self.head(x.mean(1))


def test_functional_linears_are_found() -> None:
    """F.linear, a bias that is computed and nn.MultiheadAttention are layers like any other."""
    program = trace(loaded(randomise(Functional()), (8, 8), classes=4))
    names = {layer.name for layer in program.layers}
    assert names == {"weight", "attention.in_proj", "attention.out_proj", "head"}
    assert all(layer.bias for layer in program.layers)


class FixedBatch(nn.Module):
    """Reshapes to a literal batch of 1."""

    def forward(self, images: Tensor) -> Tensor:
        return images.reshape(1, -1)[:, :7] * 2


def test_a_fixed_batch_is_said() -> None:
    """A model that cannot take any batch is traced at the one that works, with a note."""
    program = trace(loaded(FixedBatch(), (4, 4), classes=7))
    assert not program.dynamic_batch and "batch 1" in program.notes[0]


class Branching(nn.Module):
    """Chooses its result by the values it is given."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) if images.sum() > 0 else -images.flatten(1)


def test_untraceable_models_are_named() -> None:
    """What torch.export cannot trace is one error with the model's name."""
    with pytest.raises(TargetError, match=r"torch\.export cannot trace branching"):
        trace(loaded(Branching(), (4, 4), spec="branching"))


class Impure(nn.Module):
    """Answers differently while it is traced."""

    def forward(self, images: Tensor) -> Tensor:
        factor = 2.0 if torch.compiler.is_exporting() else 1.0
        return images.flatten(1) * factor


def test_a_wrong_trace_stops_the_run() -> None:
    """A traced graph with other numbers than the module is a ParityError that tells by how much."""
    with pytest.raises(ParityError, match=r"differs from impure by 1\.00e\+00"):
        trace(loaded(Impure(), (4, 4), spec="impure"))


@pytest.mark.parametrize("batch", [None, 3])
def test_exported_program_computes_the_same(batch: int | None) -> None:
    """Programs survive a second torch.export, with a dynamic and with a fixed batch."""
    model: LoadedModel = small_vit()
    program = trace(model)
    images = torch.randn(3, 3, 32, 32)
    again = exported(program, batch_size=batch).module()
    assert relative_difference(model.module(images), again(images)) < 1e-5
