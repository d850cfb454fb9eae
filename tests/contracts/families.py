"""Every family of issue 3 in a small configuration, with weights that make every part matter.

`FAMILIES[name].load()` gives a LoadedModel in well under a second. Sizes are valid for the family:
larger, smaller and non-square than native.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import timm.models as zoo
import torch
import transformers
from torch import Tensor, nn
from torchvision.models import swin_transformer, vision_transformer

from vit_export.artifacts import LoadedModel, Preprocessing, Size
from vit_export.models import LoadOptions, load
from vit_export.models.finish import finish

CLASSES = 5


@dataclass(frozen=True, slots=True)
class FamilyCase:
    """One family: how to make its small model, and sizes it can be given."""

    make: Callable[[], LoadedModel]
    larger: Size
    smaller: Size
    nonsquare: Size
    positions_matter: bool = True

    def load(self) -> LoadedModel:
        """The model with seeded, randomised weights; the same module every time (treat as read-only)."""
        return _loaded(self.make)

    def sizes(self) -> Mapping[str, Size]:
        """Native, larger, smaller and non-square, by name."""
        return {
            "native": self.load().image_size,
            "larger": self.larger,
            "smaller": self.smaller,
            "nonsquare": self.nonsquare,
        }


@cache
def _loaded(make: Callable[[], LoadedModel]) -> LoadedModel:
    torch.manual_seed(0)
    model = make()
    randomize(model.module)
    return model


def randomize(module: nn.Module, seed: int = 0) -> None:
    """Weights that let every block and every position contribute: no near-zero LayerScale or tables."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim <= 1 or "logit_scale" in name:
            parameter.data.add_(0.2 * noise)
        elif any(word in name for word in ("pos", "token", "table")):
            parameter.data.copy_(0.5 * noise)
        else:
            parameter.data.copy_(noise / parameter[0].numel() ** 0.5)


def images(size: Size, batch: int = 2, seed: int = 0) -> Tensor:
    """Seeded standard-normal float32 [batch, 3, H, W]."""
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def shuffled_patches(batch: Tensor, patch: int) -> Tensor:
    """The same patches in reverse order: what a model without positions could not tell apart."""
    n, c, h, w = batch.shape
    tiles = batch.reshape(n, c, h // patch, patch, w // patch, patch).flip(2, 4)
    return tiles.reshape(n, c, h, w)


def _native(module: nn.Module, size: int) -> LoadedModel:
    return finish(
        module,
        family=type(module).__name__,
        preprocessing=Preprocessing(size=(size, size)),
        options=LoadOptions(),
        size=(size, size),
    )


def _timm(kind: Callable[..., nn.Module], size: int, **arguments: Any) -> Callable[[], LoadedModel]:
    return lambda: _native(kind(num_classes=CLASSES, **arguments), size)


def _vit(**arguments: Any) -> Callable[[], LoadedModel]:
    kind = arguments.pop("kind", zoo.VisionTransformer)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return _timm(kind, 32, **{**shape, **arguments})


def _swin(kind: Callable[..., nn.Module]) -> Callable[[], LoadedModel]:
    return _timm(
        kind, 32, img_size=32, patch_size=2, embed_dim=16, depths=(2, 2), num_heads=(2, 2), window_size=4
    )


def _hf(architecture: str, config: str, **arguments: Any) -> Callable[[], LoadedModel]:
    """A folder with nothing but a config.json, as transformers writes it."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    given = {**({} if "depths" in arguments else shape), "num_labels": CLASSES, "image_size": 32, **arguments}

    def make() -> LoadedModel:
        settings = getattr(transformers, config)(architectures=[architecture], **given)
        with tempfile.TemporaryDirectory() as folder:
            settings.save_pretrained(folder)
            return replace(load(f"hf:{folder}"), spec=f"hf:{config}")

    return make


_PVT: Mapping[str, Any] = {
    "image_size": 64,
    "hidden_sizes": [8, 16, 16, 32],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 2, 2, 2],
    "mlp_ratios": [2, 2, 2, 2],
}
_SWIN: Mapping[str, Any] = {
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 2],
    "window_size": 4,
}
_TV_SWIN: Mapping[str, Any] = {
    "patch_size": [2, 2],
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 2],
    "window_size": [4, 4],
    "num_classes": CLASSES,
}


def _torchvision_vit() -> LoadedModel:
    return _native(
        vision_transformer.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=CLASSES),
        32,
    )


def _torchvision_swin() -> LoadedModel:
    return _native(swin_transformer.SwinTransformer(**_TV_SWIN), 32)


def _torchvision_swin_v2() -> LoadedModel:
    module = swin_transformer.SwinTransformer(
        **_TV_SWIN,
        block=swin_transformer.SwinTransformerBlockV2,
        downsample_layer=swin_transformer.PatchMergingV2,
    )
    return _native(module, 32)


def _timm_pvt2() -> LoadedModel:
    module = zoo.PyramidVisionTransformerV2(
        num_classes=CLASSES, depths=(1, 1, 1, 1), embed_dims=(8, 16, 16, 32), num_heads=(1, 2, 2, 2)
    )
    module.pretrained_cfg = {"input_size": (3, 64, 64)}
    return _native(module, 64)


class UserVit(nn.Module):
    """A module no library knows: its table has no telling name, its forward returns a dict."""

    def __init__(self, size: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 8, 8)
        self.first = nn.Parameter(torch.randn(1, 1, 32))
        self.where = nn.Parameter(torch.randn(1, 1 + (size // 8) ** 2, 32))
        self.body = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, norm_first=True)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.first.expand(tokens.shape[0], -1, -1), tokens], 1) + self.where
        tokens = self.body(tokens)
        return {"features": tokens, "logits": self.head(tokens[:, 0])}


def _user() -> LoadedModel:
    return finish(
        UserVit(),
        family="UserVit",
        preprocessing=Preprocessing(size=(224, 224)),
        options=LoadOptions(),
    )


def _case(make: Callable[[], LoadedModel], unit: int = 8, native: int = 4, **facts: Any) -> FamilyCase:
    """Sizes around a native side of `native` units."""
    return FamilyCase(
        make,
        larger=((native + 2) * unit,) * 2,
        smaller=((native // 2) * unit,) * 2,
        nonsquare=((native - 1) * unit, (native + 1) * unit),
        **facts,
    )


FAMILIES: Mapping[str, FamilyCase] = {
    "timm vit": _case(_vit(init_values=1e-5)),
    "timm vit without class token": _case(_vit(class_token=False, global_pool="avg")),
    "timm deit3": _case(_vit(no_embed_class=True, init_values=1e-6)),
    "timm deit distilled": _case(_vit(kind=zoo.VisionTransformerDistilled)),
    "timm dinov2 registers": _case(_vit(reg_tokens=4, no_embed_class=True, init_values=1e-5)),
    "timm eva02": _case(
        _vit(kind=zoo.Eva, use_rot_pos_emb=True, swiglu_mlp=True, scale_mlp=True, ref_feat_shape=(4, 4))
    ),
    "timm dinov3": _case(
        _vit(
            kind=zoo.Eva,
            use_rot_pos_emb=True,
            rope_type="dinov3",
            use_abs_pos_emb=False,
            num_reg_tokens=4,
            dynamic_img_size=True,
            rope_rotate_half=True,
            init_values=1e-5,
        )
    ),
    "timm beit": _case(_vit(kind=zoo.Beit, use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=1e-5)),
    "timm beit shared": _case(_vit(kind=zoo.Beit, use_abs_pos_emb=False, use_shared_rel_pos_bias=True)),
    "timm swin": _case(_swin(zoo.SwinTransformer)),
    "timm swinv2": _case(_swin(zoo.SwinTransformerV2)),
    "timm pvt_v2": _case(_timm_pvt2, unit=32, native=2),
    "hf vit": _case(_hf("ViTForImageClassification", "ViTConfig", patch_size=8)),
    "hf deit": _case(_hf("DeiTForImageClassification", "DeiTConfig", patch_size=8)),
    "hf deit distilled": _case(_hf("DeiTForImageClassificationWithTeacher", "DeiTConfig", patch_size=8)),
    "hf mae": _case(_hf("ViTMAEForPreTraining", "ViTMAEConfig", patch_size=8)),
    "hf dinov2": _case(_hf("Dinov2ForImageClassification", "Dinov2Config", patch_size=8)),
    "hf dinov2 registers": _case(_hf("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", patch_size=8)),
    "hf dinov3": _case(_hf("DINOv3ViTModel", "DINOv3ViTConfig", patch_size=8)),
    "hf pvt": _case(_hf("PvtForImageClassification", "PvtConfig", **_PVT), unit=32, native=2),
    "hf pvt_v2": _case(_hf("PvtV2ForImageClassification", "PvtV2Config", **_PVT), unit=32, native=2),
    "hf swin": _case(_hf("SwinForImageClassification", "SwinConfig", **_SWIN)),
    "hf swin absolute": _case(
        _hf("SwinForImageClassification", "SwinConfig", **_SWIN, use_absolute_embeddings=True)
    ),
    "hf swinv2": _case(_hf("Swinv2ForImageClassification", "Swinv2Config", **_SWIN)),
    "hf beit": _case(
        _hf("BeitForImageClassification", "BeitConfig", patch_size=8, use_relative_position_bias=True)
    ),
    "hf beit shared": _case(
        _hf("BeitForImageClassification", "BeitConfig", patch_size=8, use_shared_relative_position_bias=True)
    ),
    "torchvision vit": _case(_torchvision_vit),
    "torchvision swin": _case(_torchvision_swin),
    "torchvision swin_v2": _case(_torchvision_swin_v2),
    "user module": _case(_user),
}
