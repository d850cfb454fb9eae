"""Small members of the families TensorRT must take: their real code, a depth and width for tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from vit_export.artifacts import Images, LoadedModel, Positions, Precision, Preprocessing, Program
from vit_export.calibration.collect import calibrate
from vit_export.calibration.observers import MinMaxConfig
from vit_export.calibration.plan import plan
from vit_export.export.program import trace
from vit_export.export.quantize import quantize
from vit_export.export.targets.tensorrt_engine import TensorRtTarget


class _Logits(nn.Module):
    """transformers' output as a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images).logits
        return logits


def _timm(name: str, **options: object) -> nn.Module:
    import timm

    module: nn.Module = timm.create_model(name, pretrained=False, num_classes=10, **options)
    return module


def _pvt(size: int) -> nn.Module:
    from transformers import PvtConfig, PvtForImageClassification

    config = PvtConfig(
        image_size=size, num_encoder_blocks=2, depths=[1, 1], hidden_sizes=[16, 32], mlp_ratios=[2, 2],
        num_attention_heads=[1, 2], patch_sizes=[4, 2], strides=[4, 2], sequence_reduction_ratios=[4, 1],
        num_labels=10,
    )  # fmt: skip
    return _Logits(PvtForImageClassification(config))


_SMALL = {"depth": 2, "embed_dim": 64, "num_heads": 2}
_LESS = {**_SMALL, "depth": 1}
_PYRAMID = {
    "depths": (1, 1), "embed_dims": (16, 32), "num_heads": (1, 2), "sr_ratios": (4, 2), "mlp_ratios": (2, 2),
}  # fmt: skip
_SWIN = {"window_size": 4, "depths": (2, 1), "embed_dim": 32, "num_heads": (1, 2)}

# family → (sizes: native, another), and how to make it at a size
FAMILIES: Mapping[str, tuple[tuple[int, int], Callable[[int], nn.Module]]] = {
    "vit": ((64, 96), lambda s: _timm("vit_tiny_patch16_224", img_size=s, **_SMALL)),
    "deit": ((64, 96), lambda s: _timm("deit_tiny_distilled_patch16_224", img_size=s, **_LESS)),
    "pvt_v2": ((64, 96), lambda s: _timm("pvt_v2_b0", **_PYRAMID)),
    "pvt": ((64, 96), _pvt),
    "swin": ((64, 128), lambda s: _timm("swin_tiny_patch4_window7_224", img_size=s, **_SWIN)),
    "beit": ((64, 96), lambda s: _timm("beit_base_patch16_224", img_size=s, **_LESS)),
    "dinov2": ((56, 84), lambda s: _timm("vit_small_patch14_dinov2", img_size=s, **_LESS)),
}


def noise(size: int, count: int = 4) -> Images:
    """Standard normal float32 [count, 3, size, size]."""
    return np.random.default_rng(0).standard_normal((count, 3, size, size), dtype=np.float32)


def program(family: str, size: int) -> Program:
    """The traced model with seeded weights whose biases are not all zero."""
    torch.manual_seed(0)
    module = FAMILIES[family][1](size).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model = LoadedModel(
        module=module, spec=family, family=family, preprocessing=Preprocessing((size, size)), num_classes=10,
        source_image_size=(size, size), multiple=(1, 1), positions=Positions.ABSOLUTE,
    )  # fmt: skip
    return trace(model)


def quantized(source: Program) -> Program:
    """Every layer in int8 as TensorRT takes it, calibrated on noise."""
    ranges = calibrate(source, [noise(source.image_size[0])], MinMaxConfig())
    return quantize(source, plan(ranges, source.layers), TensorRtTarget().profile(Precision.INT8, {}))


def outputs(source: Program, images: Images) -> np.ndarray:
    """What a program answers in PyTorch."""
    with torch.inference_mode():
        answer: np.ndarray = source.graph(torch.from_numpy(images)).numpy()
    return answer
