"""DINOv2-S at 224 as a user's own file: `vit-export --model examples/dinov2.py:backbone --checkpoint FILE`.

FILE holds the weights of timm's vit_small_patch14_dinov2 at 518 pixels. `classifier` adds a linear head of
ten classes, whose weights the checkpoint must hold too (benchmarks/dinov2_probe.py writes such a file).
"""

import timm
from torch import nn

NAME = "vit_small_patch14_dinov2.lvd142m"


def backbone() -> nn.Module:
    """[N, 384] embeddings."""
    return timm.create_model(NAME, img_size=518, num_classes=0)


def classifier() -> nn.Module:
    """[N, 10] logits."""
    return timm.create_model(NAME, img_size=518, num_classes=10)
