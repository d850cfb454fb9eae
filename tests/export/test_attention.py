"""Attention read from the graph is what the model computes, in every family."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from contracts.families import FAMILIES, images
from vit_export.artifacts import LoadedModel, Preprocessing
from vit_export.errors import TargetError
from vit_export.export import attention
from vit_export.export.attention import Walk, attend, divergence, find_attention, from_windows, weights_of
from vit_export.export.program import trace
from vit_export.models import LoadOptions
from vit_export.models.finish import finish

WINDOWED = ("swin",)
PYRAMIDS = ("pvt",)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_shows_its_attention(name: str) -> None:
    """Rows of every layer sum to 1; each has a map a head inside the image; rollout where defined."""
    program = trace(FAMILIES[name].load())
    image = images(program.image_size, 1)
    for seen in Walk(program).attention(image):
        torch.testing.assert_close(seen.weights.sum(-1), torch.ones(seen.weights.shape[:-1]))
        assert float(seen.weights.min()) >= 0
    found = attend(program, program, image.numpy())
    assert len(found.layers) >= 1 and all(layer.kl == 0 for layer in found.layers)
    for layer in found.layers:
        assert layer.float_maps is not None and layer.grid is not None, layer.reason
        assert layer.float_maps.shape == (layer.heads, *layer.grid)
        assert np.all(layer.float_maps.sum((1, 2)) <= 1 + 1e-5)
        np.testing.assert_array_equal(layer.float_maps, layer.int8_maps)
    if any(word in name for word in (*WINDOWED, *PYRAMIDS)):
        assert found.float_rollout is None and found.rollout_reason.startswith("rollout needs")
    else:
        assert found.float_rollout is not None and found.float_rollout.shape == (4, 4)
        assert 0 < found.float_rollout.sum() <= 1 + 1e-5


@pytest.mark.parametrize("name", ["timm vit", "timm deit distilled", "timm dinov2 registers", "timm beit"])
def test_maps_are_those_of_a_hook_in_eager(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph's weights equal what a hook on timm's unfused attention sees, layer by layer, for each query
    that the graph still has (the last layer keeps those that are read)."""
    model = FAMILIES[name].load()
    image = images(model.image_size, 1)
    hooked: list[Tensor] = []
    blocks = [m for m in model.module.modules() if hasattr(m, "fused_attn")]
    handles = [m.attn_drop.register_forward_hook(lambda _, got, __: hooked.append(got[0])) for m in blocks]
    for block in blocks:
        monkeypatch.setattr(block, "fused_attn", False)
    with torch.inference_mode():
        model.module(image)
    for handle in handles:
        handle.remove()
    monkeypatch.undo()
    seen = [one.weights for one in Walk(trace(model)).attention(image)]
    assert len(seen) == len(hooked) == 2
    assert seen[0].shape == hooked[0].shape
    for ours, theirs in zip(seen, hooked, strict=True):
        torch.testing.assert_close(ours, theirs[..., : ours.shape[-2], :], rtol=1e-4, atol=1e-6)


def test_rollout_is_the_paper_s_recursion() -> None:
    """Rollout is row-stochastic and equals 0.5 W + 0.5 I multiplied over layers (Abnar and Zuidema 2020)."""
    weights = torch.rand(3, 2, 17, 17).softmax(-1)
    flow = attention.Rollout()
    for layer in weights:
        flow.add(layer)
    expected = torch.eye(17)
    for layer in weights:
        expected = (0.5 * layer.mean(0) + 0.5 * torch.eye(17)) @ expected
    assert flow.matrix is not None
    torch.testing.assert_close(flow.matrix, expected)
    torch.testing.assert_close(flow.matrix.sum(-1), torch.ones(17))
    shown = flow.map((4, 4))
    assert shown is not None
    np.testing.assert_allclose(shown, expected[0, 1:].reshape(4, 4), rtol=1e-6)


def test_rollout_ends_with_the_queries_that_are_read() -> None:
    """A last layer with the class token's query alone gives the class token's row of the whole rollout."""
    weights = torch.rand(2, 2, 17, 17).softmax(-1)
    whole, cut = attention.Rollout(), attention.Rollout()
    for layer in weights:
        whole.add(layer)
    cut.add(weights[0])
    cut.add(weights[1, :, :1], first=0)
    np.testing.assert_allclose(cut.map((4, 4)), whole.map((4, 4)), rtol=1e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize("masked", ["none", "bool", "float", "causal", "scale", "grouped"])
def test_fused_weights_are_torch_s(masked: str) -> None:
    """The softmax recomputed from an SDPA's arguments gives its output when multiplied with the values."""
    torch.manual_seed(0)
    query, value = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 5, 8)
    key = torch.randn(2, 2 if masked == "grouped" else 4, 5, 8)
    arguments = {
        "none": {}, "scale": {"scale": 0.3}, "causal": {"is_causal": True}, "grouped": {"enable_gqa": True},
        "bool": {"attn_mask": torch.eye(5, dtype=torch.bool) | (torch.rand(5, 5) > 0.5)},
        "float": {"attn_mask": torch.randn(1, 4, 5, 5)},
    }[masked]  # fmt: skip
    ours = weights_of(query, key, value, **arguments)  # type: ignore[arg-type]
    given = value[:, :2] if masked == "grouped" else value
    theirs = nn.functional.scaled_dot_product_attention(query, key, given, **arguments)  # type: ignore[arg-type]
    values = given.repeat_interleave(2, 1) if masked == "grouped" else given
    torch.testing.assert_close(ours @ values, theirs)


def test_shifted_windows_are_put_back() -> None:
    """Windows cut from a rolled image give the map of the image as it was."""
    truth = torch.arange(64.0).reshape(8, 8)
    rolled = truth.roll((-2, -2), (0, 1))
    windows = rolled.reshape(2, 4, 2, 4).permute(0, 2, 1, 3).reshape(4, 1, 1, 16)
    found = from_windows(windows.expand(4, 1, 16, 16), (16, 16), (-2, -2))
    assert found is not None
    torch.testing.assert_close(found[0] * 4, truth)
    assert from_windows(windows, (15, 15), (0, 0)) is None


def test_divergence_is_kullback_leibler() -> None:
    """KL is scipy's relative entropy averaged over rows, 0 for equal weights and never negative."""
    one, two = torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    expected = (0.5 * np.log(2) + 0.5 * np.log(2 / 3)) / 2
    assert divergence(one, two) == pytest.approx(expected, rel=1e-6)
    assert divergence(two, two) == 0


class Softmax(nn.Module):
    """One head, written out, with the keys' softmax mixed before its use; and a gate that is no attention."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch = nn.Conv2d(3, 8, 8, 8)
        self.qkv = nn.Linear(8, 24)
        self.mix = nn.Dropout(0.1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).chunk(3, -1)
        weights = self.mix((q @ k.transpose(1, 2)).softmax(dim=2))
        out: Tensor = self.head((weights @ v).mean(1)).softmax(-1)
        return out


def test_a_softmax_in_the_user_s_own_module_is_found() -> None:
    """A softmax multiplied with values is an attention, the one over class scores is not."""
    program = trace(_loaded(Softmax()))
    assert len(find_attention(program.graph)) == 1
    (layer,) = attend(program, None, images((32, 32), 1).numpy()).layers
    assert (layer.heads, layer.grid, layer.query) == (1, (4, 4), "mean of all tokens")
    assert layer.kl is None and layer.int8_maps is None


def test_a_model_without_attention_says_so() -> None:
    """A convolutional network is refused with what was looked for."""
    plain = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(TargetError, match="no attention found"):
        attend(trace(_loaded(plain)), None, images((32, 32), 1).numpy())


def _loaded(module: nn.Module) -> LoadedModel:
    contract = Preprocessing(size=(32, 32))
    return finish(module.eval(), family="own", preprocessing=contract, options=LoadOptions(), size=(32, 32))
