"""Every family at its native, a larger, a smaller and a non-square size."""

from __future__ import annotations

import pytest
import torch

from contracts.families import FAMILIES, images, shuffled_patches
from vit_export.models import adapt

cases = pytest.mark.parametrize("family", FAMILIES)


@cases
def test_every_block_and_position_matters(family: str) -> None:
    """The small model tells patches in another order apart, at every size: its positions are alive."""
    case = FAMILIES[family]
    for size in (case.load().image_size, case.larger, case.nonsquare):
        module = adapt(case.load(), size).module
        batch = images(size)
        with torch.no_grad():
            straight, shuffled = module(batch), module(shuffled_patches(batch, case.load().multiple[0]))
        assert (straight - shuffled).abs().max() > 1e-2 * straight.abs().max()


@cases
def test_the_source_is_left_alone(family: str) -> None:
    """Adapting changes neither a parameter nor the result of the module it starts from."""
    case = FAMILIES[family]
    model = case.load()
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    batch = images(model.image_size)
    with torch.no_grad():
        reference = model.module(batch)
        adapted = adapt(model, case.larger)
        assert torch.equal(model.module(batch), reference)
    after = model.module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.image_size != adapted.image_size == case.larger
    assert adapted.source_image_size == model.source_image_size
    assert [n for n, _ in adapted.module.named_parameters()] == [
        n for n, _ in model.module.named_parameters()
    ]


@cases
def test_the_present_size_changes_nothing(family: str) -> None:
    """Asked for the size it has, native or not, a model comes back as it is."""
    case = FAMILIES[family]
    model = case.load()
    assert adapt(model, model.image_size).module is model.module
    adapted = adapt(model, case.nonsquare)
    assert adapt(adapted, case.nonsquare).module is adapted.module
