"""Each rewrite of export/fold.py leaves the numbers alone and does what it is named for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from contracts.families import FAMILIES
from contracts.small import loaded, randomise
from vit_export.export.graph import aten
from vit_export.export.program import relative_difference, trace

ATTENTION = aten.scaled_dot_product_attention.default


class Block(nn.Module):
    """Convolution, BatchNorm, linear, LayerScale, dropout and a bias table that is computed."""

    def __init__(self, negative: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, 4, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 8)
        self.gamma = nn.Parameter(torch.linspace(-1 if negative else 0.1, 1, 8))
        self.table = nn.Parameter(torch.randn(4, 8))
        self.register_buffer("index", torch.arange(16).reshape(16) % 4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.conv(images)).flatten(2).transpose(1, 2).contiguous()
        x = x + self.drop(self.fc(x) * self.gamma)
        x = x + self.table[self.index].view(1, 16, 8)
        return self.head(x.mean(1))


def _block(negative: bool = False) -> Block:
    block = randomise(Block(negative))
    assert isinstance(block, Block)
    block.norm.running_mean.normal_()
    block.norm.running_var.uniform_(0.5, 2)
    return block


@pytest.mark.parametrize("negative", [False, True])
def test_folding_keeps_the_numbers(negative: bool) -> None:
    """BatchNorm, LayerScale (also with negative factors), dropout and tables fold without a difference."""
    block = _block(negative)
    program = trace(loaded(block, (16, 16), classes=5))
    images = torch.randn(3, 3, 16, 16)
    assert relative_difference(block(images), program.graph(images)) < 1e-5


def test_folding_removes_what_it_names() -> None:
    """No BatchNorm, dropout, factor or table lookup is left in the graph."""
    targets = {n.target for n in trace(loaded(_block(), (16, 16), classes=5)).graph.graph.nodes}
    gone = {aten.batch_norm.default, aten.dropout.default, aten.mul.Tensor, aten.index.Tensor}
    assert not targets & gone
    assert aten.view.default not in targets


def test_source_weights_are_untouched() -> None:
    """Folding writes new tensors: the module that was traced computes what it did before."""
    block = _block()
    images = torch.randn(2, 3, 16, 16)
    before = block(images).clone()
    weight = block.fc.weight.detach().clone()
    trace(loaded(block, (16, 16), classes=5))
    assert torch.equal(block.fc.weight, weight)
    assert torch.equal(block(images), before)


class SharedWeight(nn.Module):
    """One linear used twice, scaled only the first time."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(48, 48)
        self.gamma = nn.Parameter(torch.linspace(0.5, 2, 48))

    def forward(self, images: Tensor) -> Tensor:
        x = images.flatten(1)
        return self.fc(self.fc(x) * self.gamma)


def test_a_shared_weight_is_split_before_it_is_scaled() -> None:
    """Folding a factor into one use of a shared weight does not change the other use."""
    module = randomise(SharedWeight())
    program = trace(loaded(module, (4, 4), classes=48))
    images = torch.randn(2, 3, 4, 4)
    assert relative_difference(module(images), program.graph(images)) < 1e-5
    assert len({layer.name for layer in program.layers}) == 2


class RandomTable(nn.Module):
    """Adds a product of parameters, in two steps with a list in between."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(6, 3))
        self.b = nn.Parameter(torch.randn(3, 12))

    def forward(self, images: Tensor) -> Tensor:
        left, right = (self.a @ self.b).relu_().chunk(2, dim=1)
        return images.mean((2, 3)) @ (left * right)[:3]


def test_constant_chains_become_one_tensor() -> None:
    """Chains of parameters are evaluated, also through lists and in-place operators."""
    module = RandomTable().eval()
    program = trace(loaded(module, (4, 4), classes=6))
    calls = [n.target for n in program.graph.graph.nodes if n.op == "call_function"]
    assert aten.relu_.default not in calls and len(calls) == 2  # mean and one product
    images = torch.randn(2, 3, 4, 4)
    assert relative_difference(module(images), program.graph(images)) < 1e-5


class Windows(nn.Module):
    """Attention inside windows, five dimensions, with a mask made of zeros of the input's kind."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Conv2d(3, 24, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.qkv(images).unflatten(1, (3, 2, 4)).unflatten(5, (2, 4))  # [N, 3, 2, 4, 8, 2, 4]
        q, k, v = tokens.permute(1, 0, 5, 2, 4, 6, 3).flatten(4, 5)  # [N, windows, heads, tokens, 4] each
        mask = images.new_zeros(32)
        mask[:7] = 2.0
        x = nn.functional.scaled_dot_product_attention(q, k, v) + mask[:, None]
        return self.head(x.mean((1, 3)).flatten(1))


def test_attention_in_windows_has_four_dimensions_and_a_constant_mask() -> None:
    """Five-dimensional attention is done in four, new_zeros folds, and the numbers stay for any batch."""
    module = randomise(Windows())
    program = trace(loaded(module, (8, 8), classes=5))
    images = torch.randn(3, 3, 8, 8)
    assert relative_difference(module(images), program.graph(images)) < 1e-5
    nodes = [n for n in program.graph.graph.nodes if n.op == "call_function"]
    assert aten.new_zeros.default not in {n.target for n in nodes}
    attention = next(n for n in nodes if n.target is aten.scaled_dot_product_attention.default)
    assert [len(arg.args[1]) for arg in attention.args[:3]] == [4, 4, 4]  # type: ignore[union-attr]


@pytest.mark.parametrize("family", ["hf vit", "hf dinov2", "hf mae", "hf deit"])
def test_masks_that_hide_nothing_go(family: str) -> None:
    """transformers lets every token see every other by a mask of the batch's size: attention has none."""
    graph = trace(FAMILIES[family].load()).graph.graph
    attentions = [node for node in graph.nodes if node.target is ATTENTION]
    assert attentions and all(len(node.all_input_nodes) == 3 for node in attentions)
    assert not any(
        node.target is aten.expand.default and len(node.meta["val"].shape) == 4 for node in graph.nodes
    )


@pytest.mark.parametrize("family", ["hf beit", "hf beit shared"])
def test_a_bias_with_such_a_mask_is_a_constant(family: str) -> None:
    """BEiT's table and the mask are one tensor, not computed for every image."""
    attentions = [
        node for node in trace(FAMILIES[family].load()).graph.graph.nodes if node.target is ATTENTION
    ]
    assert attentions and all(node.all_input_nodes[3].op == "get_attr" for node in attentions)


class _Repeats(nn.Module):
    """A class token that is repeated for the batch, moved by its position, and joined to the patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 5)
        self.first, self.where = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 1, 8))

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch(images).flatten(2).transpose(1, 2)
        first = self.where + self.first.expand(images.shape[0], -1, -1)
        answer: Tensor = self.head(torch.cat([first, patches], 1).mean(1))
        return answer


def test_tokens_stay_one_an_image() -> None:
    """What is repeated for the batch and is no mask keeps its batch."""
    model = loaded(randomise(_Repeats()), (16, 16), classes=5)
    program = trace(model)
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        assert program.dynamic_batch
        assert relative_difference(model.module(images), program.graph(images)) < 1e-6
