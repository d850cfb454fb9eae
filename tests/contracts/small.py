"""Small real models for tests: every block contributes, nothing is at its near-zero initialisation."""

from __future__ import annotations

import torch
from torch import nn

from vit_export.artifacts import LoadedModel, Positions, Preprocessing, Size


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter a seeded value of a size that trained networks have."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim > 1:
                fan_in = value[0].numel()
                value.copy_(noise / fan_in**0.5 if "pos" not in name else noise * 0.5)
            elif name.endswith("bias"):
                value.copy_(noise * 0.1)
            else:
                value.copy_(1 + noise * 0.2)
    return module.eval()


def loaded(module: nn.Module, size: Size, *, classes: int = 10, spec: str = "test") -> LoadedModel:
    """A LoadedModel around any module, with the default preprocessing."""
    return LoadedModel(
        module=module.eval(),
        spec=spec,
        family="test",
        preprocessing=Preprocessing(size),
        num_classes=classes,
        source_image_size=size,
        multiple=(1, 1),
        positions=Positions.ABSOLUTE,
    )


def small_vit(size: int = 32, **options: object) -> LoadedModel:
    """A two-block ViT with LayerScale: 32x32, patch 8, width 48, 3 heads, 10 classes."""
    from timm.models.vision_transformer import VisionTransformer

    settings: dict[str, object] = {
        "img_size": size,
        "patch_size": 8,
        "embed_dim": 48,
        "depth": 2,
        "num_heads": 3,
        "num_classes": 10,
        "init_values": 0.5,
    }
    torch.manual_seed(0)
    return loaded(randomise(VisionTransformer(**(settings | options))), (size, size), spec="small-vit")
