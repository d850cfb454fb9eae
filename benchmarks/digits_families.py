"""int8 on models that were trained: DeiT (distilled), PVTv2 and Swin on scikit-learn's digits.

    python benchmarks/digits_families.py OUT [deit pvt_v2 swin]

Trains each on one core in one to three minutes (kept in OUT, not trained again), exports it in int8 to ONNX
Runtime and OpenVINO and prints top-1, the drop with its interval, agreement and SQNR on the 500 evaluation
images, which neither training nor calibration saw. The functions below are also factories:
`vit-export --model benchmarks/digits_families.py:swin --checkpoint OUT/swin.safetensors`.
"""

from __future__ import annotations

import importlib.util
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from timm.models.deit import VisionTransformerDistilled
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.swin_transformer import SwinTransformer
from torch import nn


def deit() -> nn.Module:
    """Class and distillation token, 48x48 in 8x8 patches."""
    return VisionTransformerDistilled(
        img_size=48, patch_size=8, embed_dim=96, depth=4, num_heads=3, num_classes=10
    )


def pvt_v2() -> nn.Module:
    """Four stages with overlapping patches and spatial reduction, 64x64."""
    return PyramidVisionTransformerV2(
        num_classes=10, depths=(1, 1, 2, 1), embed_dims=(32, 64, 96, 128), num_heads=(1, 2, 3, 4)
    )


def swin() -> nn.Module:
    """Two stages, shifted 4x4 windows in the first, 32x32."""
    return SwinTransformer(
        img_size=32,
        patch_size=4,
        window_size=4,
        embed_dim=48,
        depths=(2, 2),
        num_heads=(3, 6),
        num_classes=10,
    )


@dataclass(frozen=True)
class Family:
    """How one model is made and trained: image side in pixels, epochs, highest learning rate."""

    make: Callable[[], nn.Module]
    size: int
    epochs: int
    rate: float


FAMILIES = {
    "deit": Family(deit, 48, 60, 2e-3),
    "pvt_v2": Family(pvt_v2, 64, 12, 1e-3),
    "swin": Family(swin, 32, 100, 2e-3),
}


def training() -> Any:
    """data/training/train_digits_vit.py, which is not in the package."""
    path = Path(__file__).parents[1] / "data" / "training" / "train_digits_vit.py"
    spec = importlib.util.spec_from_file_location("train_digits_vit", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def trained(name: str, out: Path, recipe: Any) -> tuple[Path, float, float]:
    """The checkpoint, and mean and deviation of the training pixels."""
    from vit_export.artifacts import Preprocessing

    splits = recipe.load_splits()
    mean, std = recipe.training_statistics(splits[0])
    path = out / f"{name}.safetensors"
    if not path.exists():
        torch.manual_seed(0)
        random.seed(0)
        torch.set_num_threads(1)  # one core, and the same sums whatever the machine has
        family = FAMILIES[name]
        contract = Preprocessing((family.size, family.size), (mean,) * 3, (std,) * 3)
        model = family.make()
        stage = recipe.Stage(size=family.size, epochs=family.epochs, rate=family.rate, warmup=4)
        recipe.fit(model, recipe.tensors(splits[0], contract), recipe.tensors(splits[1], contract), stage)
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    for split, which in zip(splits[1:], ("calib", "eval"), strict=True):
        np.savez_compressed(out / f"{which}.npz", images=split.images, labels=split.labels)
    return path, mean, std


def judge(name: str, out: Path) -> None:
    """Train if needed, export in int8, print one line an artifact."""
    from vit_export.artifacts import Precision
    from vit_export.job import ExportJob
    from vit_export.models.config import LoadOptions
    from vit_export.pipeline import run

    checkpoint, mean, std = trained(name, out, training())
    size = FAMILIES[name].size
    job = ExportJob(
        model=f"{Path(__file__).resolve()}:{name}",
        load=LoadOptions(checkpoint=checkpoint, mean=(mean,) * 3, std=(std,) * 3),
        image_sizes=((size, size),), targets=("onnx", "openvino"), precisions=(Precision.INT8,),
        calib=out / "calib.npz", evaluation=out / "eval.npz", output=out / name, bundle_images=None,
    )  # fmt: skip
    report = run(job)
    for r in report.results:
        assert r.top1_drop_ci95 is not None
        low, high = r.top1_drop_ci95
        print(
            f"| {name} | {r.target} | {report.baseline.top1:.3f} | {r.top1:.3f} | {r.top1_drop:.1f} "
            f"[{low:.1f}, {high:.1f}] | {r.agreement:.3f} | {r.sqnr_db:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    print("| model | target | FP32 top-1 | int8 top-1 | drop, points | agreement | SQNR dB |")
    print("|---|---|---|---|---|---|---|")
    for family in sys.argv[2:] or FAMILIES:
        judge(family, folder)
