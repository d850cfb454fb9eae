"""Channels are traced to their readers in every family, and moving outliers changes no answer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from contracts.families import FAMILIES, images
from contracts.small import loaded, small_vit
from vit_export.artifacts import Program
from vit_export.calibration.collect import channel_statistics
from vit_export.export.channels import find_groups, loose
from vit_export.export.equalize import division, equalization, equalize
from vit_export.export.program import relative_difference, trace


def _readers(program: Program) -> set[str]:
    return {consumer.layer.name for group in find_groups(program) for consumer in group.consumers}


@pytest.mark.parametrize("family", FAMILIES)
def test_equalised_families_answer_the_same(family: str) -> None:
    """Outliers moved out of every group a family has, in float: the outputs differ by rounding alone."""
    program = trace(FAMILIES[family].load())
    groups = find_groups(program)
    assert groups
    seen = channel_statistics(program, [images(program.image_size, 2, seed=1).numpy()])
    changed = equalize(program, [equalization(program, group, seen, 0.5) for group in groups])
    fresh = images(program.image_size, 2, seed=2)
    with torch.inference_mode():
        assert relative_difference(program.graph(fresh), changed.graph(fresh)) < 1e-5


def test_a_vit_has_its_norms_and_its_values() -> None:
    """qkv and fc1 read LayerNorms, proj reads the value rows of qkv; fc2 reads GELU and cannot be changed."""
    readers = _readers(trace(small_vit()))
    assert {f"blocks.{i}.{name}" for i in (0, 1) for name in ("attn.qkv", "attn.proj", "mlp.fc1")} <= readers
    assert not any(name.endswith("fc2") for name in readers)


def test_equalising_narrows_a_planted_outlier() -> None:
    """A channel a hundred times as large as the others no longer decides the range afterwards."""
    model = small_vit()
    model.module.blocks[0].norm1.weight.data[3] *= 100  # type: ignore[union-attr, index]
    program = trace(model)
    pictures = [images((32, 32), 8).numpy()]
    group = next(g for g in find_groups(program) if g.consumers[0].layer.name == "blocks.0.attn.qkv")
    before = channel_statistics(program, pictures)
    changed = equalize(program, [equalization(program, group, before, 0.5)])
    peaks = [s["blocks.0.attn.qkv"].abs_max() for s in (before, channel_statistics(changed, pictures))]
    spread = [float(peak.max() / peak.mean()) for peak in peaks]
    assert spread[0] > 20 and spread[1] < spread[0] / 3


@pytest.mark.parametrize("family", ["timm vit", "hf pvt", "timm swin", "timm eva02"])
def test_dividing_outliers_changes_no_answer(family: str) -> None:
    """The inputs that no norm and no linear makes, divided in front of the linears that read them."""
    program = trace(FAMILIES[family].load())
    seen = channel_statistics(program, [images(program.image_size, 8, seed=1).numpy()])
    free = loose(program, find_groups(program))
    found = [one for group in free if (one := division(program, group, seen)) is not None]
    fresh = images(program.image_size, 2, seed=2)
    with torch.inference_mode():
        assert relative_difference(program.graph(fresh), equalize(program, found).graph(fresh)) < 1e-5
    assert not {c.layer.name for g in free for c in g.consumers} & _readers(program)


def test_turned_heads_share_a_factor() -> None:
    """One factor a head and no shift: what rotation mixed stays mixed."""
    program = trace(small_vit())
    seen = channel_statistics(program, [images((32, 32), 8).numpy()])
    group = next(g for g in find_groups(program) if g.heads)
    found = equalization(program, group, seen, 0.5, by_head=True)
    assert len(group.heads) == 3 and not found.shift.any() and found.headroom == 1.0
    assert [len(found.scale[head].unique()) for head in group.heads] == [1, 1, 1]


class _Leaky(nn.Module):
    """A LayerNorm whose output is also added to something: its channels are not free."""

    def __init__(self, *, leak: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch, self.norm = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8)
        self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, 10)
        self.leak = leak

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(self.patch(x).flatten(2).transpose(1, 2))
        tokens = torch.tanh(self.fc(normed))
        result: Tensor = self.head((tokens + normed if self.leak else tokens).mean(1))
        return result


@pytest.mark.parametrize("leak", [False, True])
def test_a_channel_that_is_read_elsewhere_is_left_alone(leak: bool) -> None:
    """The same norm is a group without the addition and none with it."""
    assert ("fc" in _readers(trace(loaded(_Leaky(leak=leak), (16, 16))))) is not leak


def test_shared_weights_are_left_alone() -> None:
    """A linear used twice cannot be changed for one of its readers."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch, self.norm, self.fc = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.fc(self.norm(self.patch(x).flatten(2).transpose(1, 2)))
            result: Tensor = self.fc(self.norm(torch.tanh(tokens))).mean(1)
            return result

    torch.manual_seed(0)
    assert not _readers(trace(loaded(Twice(), (16, 16), classes=8)))
