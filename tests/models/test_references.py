"""Adapted models against the libraries' own way to another size."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import timm.models as zoo
import torch
import transformers
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer

from contracts.families import CLASSES, FAMILIES, images, randomize
from vit_export.artifacts import LoadedModel, Preprocessing
from vit_export.models import AdaptConfig, LoadOptions, PosEmbedMode, adapt
from vit_export.models.finish import finish

_TIMM = [name for name in FAMILIES if name.startswith("timm ") and name != "timm pvt_v2"]
_TABLES = ("hf vit", "hf deit", "hf deit distilled", "hf swin absolute")
_LIKE_TRANSFORMERS = AdaptConfig(antialias=False)


def close(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> bool:
    """Within `tolerance` of the largest value."""
    return bool((one - other).abs().max() < tolerance * one.abs().max())


def original(model: LoadedModel) -> Any:
    """The library's own module with the same weights and its own forward."""
    module = model.module
    fresh: Any = type(module)(module.config)
    fresh.load_state_dict(module.state_dict(), strict=True)
    return fresh.eval()


@pytest.mark.parametrize("family", _TIMM)
def test_timm_agrees_with_set_input_size(family: str) -> None:
    """The default settings give what timm's set_input_size gives, at a square and a non-square size."""
    case = FAMILIES[family]
    for size in (case.larger, case.smaller, case.nonsquare):
        theirs: Any = deepcopy(case.load().module)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch's, about timm's interpolation
            theirs.set_input_size(img_size=size)
        batch = images(size)
        with torch.no_grad():
            assert torch.equal(adapt(case.load(), size).module(batch), theirs(batch))


# transformers fails below Swin's native size: its bias table does not fit the smaller window.
_KINDS = ("larger", "smaller", "nonsquare")
_TABLE_SIZES = [(f, k) for f in _TABLES for k in _KINDS if (f, k) != ("hf swin absolute", "smaller")]


@pytest.mark.parametrize(("family", "kind"), _TABLE_SIZES)
def test_transformers_agrees_with_interpolate_pos_encoding(family: str, kind: str) -> None:
    """With its settings (bicubic, no antialias) the numbers are those of interpolate_pos_encoding=True."""
    case = FAMILIES[family]
    size = case.sizes()[kind]
    batch = images(size)
    with torch.no_grad():
        theirs = original(case.load())(batch, interpolate_pos_encoding=True).logits
        ours = adapt(case.load(), size, _LIKE_TRANSFORMERS).module(batch)
    assert close(theirs, ours)


@pytest.mark.parametrize(
    ("family", "antialias"), [("hf dinov2", False), ("hf dinov2 registers", True), ("hf dinov3", True)]
)
def test_transformers_dino_agrees_with_its_forward(family: str, antialias: bool) -> None:
    """DINOv2 interpolates by itself, with registers antialiased; DINOv3 computes its angles."""
    case = FAMILIES[family]
    for size in (case.larger, case.smaller, case.nonsquare):
        batch = images(size)
        with torch.no_grad():
            theirs = original(case.load())(batch)
            theirs = theirs.logits if "logits" in theirs else theirs.pooler_output
            ours = adapt(case.load(), size, AdaptConfig(antialias=antialias)).module(batch)
        assert close(theirs, ours)


def test_mae_encoder_sees_every_patch() -> None:
    """The encoder without masking is transformers' encoder with mask_ratio 0, whose order is random."""
    case = FAMILIES["hf mae"]
    config = deepcopy(case.load().module.config)
    config.mask_ratio = 0.0
    theirs = transformers.ViTMAEModel(config)
    theirs.load_state_dict(case.load().module.state_dict())
    batch = images(case.larger)
    with torch.no_grad():
        hidden = theirs.eval()(batch, interpolate_pos_encoding=True).last_hidden_state
        ours = adapt(case.load(), case.larger, _LIKE_TRANSFORMERS).module(batch)
    assert close(hidden[:, 0], ours)


@pytest.mark.parametrize("side", [32, 96, 128])
def test_pvt_agrees_with_transformers_at_the_new_size(side: int) -> None:
    """Transformers' own PVT built for the new size, given each stage's resampled table, computes the same.

    Its forward cannot resize: it reshapes the old table to the new grid, which fails.
    """
    case = FAMILIES["hf pvt"]
    adapted = adapt(case.load(), (side, side))
    config = deepcopy(case.load().module.config)
    config.image_size = side
    theirs = transformers.PvtForImageClassification(config)
    theirs.load_state_dict(adapted.module.state_dict(), strict=True)
    batch = images((side, side))
    with torch.no_grad():
        assert close(theirs.eval()(batch).logits, adapted.module(batch))
        with pytest.raises(RuntimeError):
            original(case.load())(batch)


def test_pvt_tables_are_resampled_stage_by_stage() -> None:
    """Each table goes from its own grid to its own grid, bilinear as published; the class row is kept."""
    case = FAMILIES["hf pvt"]
    bilinear = AdaptConfig(mode=PosEmbedMode.BILINEAR, antialias=False)
    before = case.load().module.state_dict()
    after = adapt(case.load(), (64, 128), bilinear).module.state_dict()
    for stage, stride in enumerate((4, 8, 16, 32)):
        name = f"pvt.encoder.patch_embeddings.{stage}.position_embeddings"
        prefix, grid, new = int(stage == 3), (64 // stride,) * 2, (64 // stride, 128 // stride)
        table = before[name][0, prefix:].T.reshape(1, -1, *grid)
        expected = nn.functional.interpolate(table, new, mode="bilinear").flatten(2)[0].T
        assert torch.equal(before[name][:, :prefix], after[name][:, :prefix])
        assert torch.allclose(expected, after[name][0, prefix:], atol=1e-6)


@pytest.mark.parametrize("family", ["hf beit", "hf beit shared"])
def test_beit_agrees_with_transformers(family: str) -> None:
    """Relative tables resized once give what transformers resizes in every forward."""
    case = FAMILIES[family]
    for size in (case.load().image_size, case.larger, case.smaller, case.nonsquare):
        batch = images(size)
        with torch.no_grad():
            assert close(original(case.load())(batch).logits, adapt(case.load(), size).module(batch))


@pytest.mark.parametrize("family", ["hf swin", "hf swinv2", "hf pvt_v2"])
def test_windows_are_kept_as_transformers_does(family: str) -> None:
    """Above the native size, square or not, the result is that of transformers' own forward."""
    case = FAMILIES[family]
    for size in (case.load().image_size, case.larger, (case.larger[0], case.load().image_size[1])):
        batch = images(size)
        with torch.no_grad():
            assert close(original(case.load())(batch).logits, adapt(case.load(), size).module(batch))


@pytest.mark.parametrize("family", ["torchvision swin", "torchvision swin_v2"])
def test_windows_are_kept_as_torchvision_does(family: str) -> None:
    """Above the native size the result is that of torchvision's own forward, which takes any size."""
    case = FAMILIES[family]
    batch = images(case.larger)
    with torch.no_grad():
        assert close(case.load().module(batch), adapt(case.load(), case.larger).module(batch))


def test_torchvision_vit_agrees_with_one_built_for_the_size() -> None:
    """torchvision's ViT of the new size with the resampled table computes the same."""
    case = FAMILIES["torchvision vit"]
    adapted = adapt(case.load(), case.larger)
    theirs = VisionTransformer(case.larger[0], 8, 2, 2, 32, 64, num_classes=CLASSES)
    theirs.load_state_dict(adapted.module.state_dict(), strict=True)
    batch = images(case.larger)
    with torch.no_grad():
        assert close(theirs.eval()(batch), adapted.module(batch))


def _hf_bias(module: Any) -> Any:
    return module.swin.encoder.layers[1].blocks[0].attention.relative_position_bias


def _torchvision_bias(module: Any) -> Any:
    return module.features[3][0].attn


@pytest.mark.parametrize(
    ("family", "bias_of"), [("hf swin", _hf_bias), ("torchvision swin", _torchvision_bias)]
)
def test_a_window_larger_than_the_stage_keeps_its_biases(family: str, bias_of: Callable[[Any], Any]) -> None:
    """A 2x2 stage of a window learned for 4x4 reads the bias of every offset unchanged."""
    bias = bias_of(adapt(FAMILIES[family].load(), (8, 8)).module)
    assert tuple(bias.window_size) == (2, 2)
    table = bias.relative_position_bias_table.reshape(7, 7, -1)
    rows = bias.relative_position_bias_table[bias.relative_position_index].reshape(4, 4, -1)
    for query in range(4):
        for key in range(4):
            dy, dx = query // 2 - key // 2, query % 2 - key % 2
            assert torch.equal(rows[query, key], table[3 + dy, 3 + dx])


def test_adapting_down_and_up_again_restores_windows() -> None:
    """Kept windows lose nothing on the way through a smaller size: no table was cut."""
    for family in ("hf swin", "hf swinv2", "torchvision swin", "torchvision swin_v2"):
        case = FAMILIES[family]
        back = adapt(adapt(case.load(), (8, 8)), case.larger)
        batch = images(case.larger)
        with torch.no_grad():
            assert torch.equal(back.module(batch), adapt(case.load(), case.larger).module(batch))


def test_timm_modes_other_than_its_own() -> None:
    """--pos-embed-mode nearest on a timm model copies table rows; the default would blend them."""
    case = FAMILIES["timm vit"]
    nearest = adapt(case.load(), (64, 64), AdaptConfig(mode=PosEmbedMode.NEAREST)).module.pos_embed
    source = case.load().module.pos_embed
    doubled = source[:, 1:].reshape(4, 4, -1).repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(nearest[:, :1], source[:, :1])
    assert torch.equal(nearest[0, 1:], doubled.reshape(64, -1))


def test_a_model_with_dynamic_image_size_gets_a_fixed_table() -> None:
    """timm's dynamic_img_size=True resamples in the graph; ours does not, and computes the same."""
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 3}
    module = zoo.VisionTransformer(**shape, dynamic_img_size=True).eval()
    randomize(module)
    batch = images((48, 32))
    with torch.no_grad():
        theirs = module(batch)
    model = finish(module, family="vit", preprocessing=Preprocessing((32, 32)), options=LoadOptions())
    adapted = adapt(model, (48, 32))
    program = torch.export.export(adapted.module, (batch,))
    assert not [n for n in program.graph.nodes if "upsample" in str(n.target)]
    with torch.no_grad():
        assert close(theirs, adapted.module(batch))
