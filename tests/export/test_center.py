"""Channel means move into biases: nothing changes in float, and float16 has less to round."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from contracts.families import FAMILIES, images
from contracts.small import loaded, small_vit
from vit_export.artifacts import Program
from vit_export.export.center import center
from vit_export.export.channels import find_keys
from vit_export.export.graph import aten
from vit_export.export.program import relative_difference, trace

# Positions turned into the keys, attention of cosines, or products written out: keys keep their means.
_KEEPS_KEYS = {
    "timm eva02", "timm dinov3", "timm swin", "timm swinv2", "hf dinov3", "hf pvt", "hf pvt_v2", "hf swinv2",
    "torchvision swin", "torchvision swin_v2",
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_centred_family_answers_the_same(family: str) -> None:
    """In every family the outputs differ by float rounding alone."""
    program = trace(FAMILIES[family].load())
    centred = center(program, images(program.image_size, 3, seed=1).numpy())
    fresh = images(program.image_size, 2, seed=2)
    with torch.inference_mode():
        assert relative_difference(program.graph(fresh), centred.graph(fresh)) < 1e-5
    assert bool(find_keys(program)) is (family not in _KEEPS_KEYS)


class _Keys(torch.fx.Interpreter):
    """Runs a graph and notes the mean of each key channel over images and tokens."""

    def run_node(self, n: torch.fx.Node) -> object:
        if n.target is aten.scaled_dot_product_attention.default:
            keys: Tensor = self.fetch_args_kwargs_from_env(n)[0][1]
            self.largest = max(getattr(self, "largest", 0.0), float(keys.mean((0, 2)).abs().max()))
        return super().run_node(n)


def _largest_mean(program: Program, given: Tensor) -> float:
    keys = _Keys(program.graph)
    with torch.inference_mode():
        keys.run(given)
    return keys.largest


def test_keys_lose_their_mean() -> None:
    """A planted offset of the keys is gone, whatever the batch, where a program has one of its own."""
    model = small_vit()
    model.module.blocks[0].attn.qkv.bias.data[48:96] += 100  # type: ignore[union-attr, index]
    for batch in (1, 2, 5):
        program = trace(model, batch_size=batch, dynamic_batch=batch == 1)
        given = images((32, 32), batch)
        assert _largest_mean(program, given) > 90
        assert _largest_mean(center(program, given.numpy()), given) < 1e-4


def test_float16_rounds_less() -> None:
    """With that offset, float16 loses a fifth of what it loses when the means stay."""
    model = small_vit()
    model.module.blocks[0].attn.qkv.bias.data[48:96] += 100  # type: ignore[union-attr, index]
    program, given = trace(model), images((32, 32), 8)
    centred = center(program, given.numpy())
    with torch.inference_mode():
        reference = program.graph(given)
        noise = [
            float((p.graph.half()(given.half()).float() - reference).square().mean().sqrt())
            for p in (centred, program)
        ]
    assert noise[0] < 0.2 * noise[1]


class _Read(nn.Module):
    """Attention whose keys something else may read too."""

    def __init__(self, *, leak: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.q, self.k, self.v, self.head = (nn.Linear(8, 8) for _ in range(4))
        self.leak = leak

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        q, k, v = (part(tokens)[:, None] for part in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        result: Tensor = self.head((mixed * k if self.leak else mixed).mean((1, 2)))
        return result


@pytest.mark.parametrize("leak", [False, True])
def test_keys_that_are_read_elsewhere_keep_their_mean(leak: bool) -> None:
    """The same keys are free without the product and not free with it; the answer stays either way."""
    program = trace(loaded(_Read(leak=leak), (16, 16), classes=8))
    assert bool(find_keys(program)) is not leak
    given = images((16, 16), 4)
    with torch.inference_mode():
        centred = center(program, given.numpy()).graph(given)
        assert relative_difference(program.graph(given), centred) < 1e-5
