"""Train the embedded default `digits-vit` and write data/digits-vit.{safetensors,json} and data/digits.npz.

    pip install -e '.[test]' && python data/training/train_digits_vit.py

About 10 minutes on two cores. Needs timm and scikit-learn. The seed fixes the split and the training;
another CPU or torch version may round differently and land a few images away.

Data: scikit-learn's digits (1,797 real 8x8 scans of handwriting, E. Alpaydin and C. Kaynak, UCI, CC BY 4.0),
split by class without overlap into 1,097 for training, 200 for calibration and 500 for evaluation. Epochs and
augmentation were chosen on the calibration images; the evaluation images are looked at once, at the end.

Model: DeiT-Tiny's width (192, 3 heads of 64) with 4 blocks on 96x96 images in 8x8 patches. Trained mostly
at 48x48, then fine-tuned at 96x96 with resampled position embeddings (Touvron et al. 2019, "Fixing the
train-test resolution discrepancy"; DeiT III does the same), which takes a third of the time.
"""

from __future__ import annotations

import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.data.random_erasing import RandomErasing
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from vit_export.artifacts import Interpolation, Preprocessing
from vit_export.calibration.preprocess import to_pixels
from vit_export.data import DIGITS_IMAGES, DIGITS_VIT_CONFIG, DIGITS_VIT_WEIGHTS

SEED = 0
STORED = 32  # side of the stored images in pixels; the contract resizes them to the network's size
CALIBRATION, EVALUATION = 200, 500
BATCH = 64
KWARGS = {
    "img_size": 96,
    "patch_size": 8,
    "embed_dim": 192,
    "depth": 4,
    "num_heads": 3,
    "num_classes": 10,
}

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Stage:
    """Epochs at one image size with a linear warm-up and a cosine decay from `rate`."""

    size: int
    epochs: int
    rate: float
    warmup: int


STAGES = (Stage(size=48, epochs=70, rate=1e-3, warmup=5), Stage(size=96, epochs=12, rate=2e-4, warmup=1))


@dataclass(frozen=True, slots=True)
class Split:
    """images: uint8 [N, 32, 32, 3]; labels: [N] in 0..9."""

    images: Bytes
    labels: Ints


def load_splits() -> tuple[Split, Split, Split]:
    """Training, calibration and evaluation images, stratified by digit, sharing no image."""
    digits = load_digits()
    images = np.stack([stored(image) for image in digits.images])
    labels = digits.target.astype(np.int64)
    rest, held = train_test_split(
        np.arange(len(labels)), test_size=EVALUATION, stratify=labels, random_state=SEED
    )
    train, calib = train_test_split(rest, test_size=CALIBRATION, stratify=labels[rest], random_state=SEED)
    return tuple(Split(images[index], labels[index]) for index in (train, calib, held))  # type: ignore[return-value]


def stored(digit: npt.NDArray[np.float64]) -> Bytes:
    """An 8x8 scan with values 0..16 as a 32x32 grey RGB image."""
    scan = Image.fromarray(np.round(digit * (255 / 16)).astype(np.uint8))
    side = (STORED, STORED)
    return np.asarray(scan.resize(side, Image.Resampling.BICUBIC).convert("RGB"), np.uint8)


def tensors(split: Split, contract: Preprocessing) -> tuple[Tensor, Tensor]:
    """Normalised float32 [N, 3, H, W] and int64 labels, by the product's own preprocessing."""
    pixels = np.stack([to_pixels(Image.fromarray(image), contract) for image in split.images])
    return torch.from_numpy(contract.normalize(pixels)), torch.from_numpy(split.labels)


def augment(images: Tensor, erase: RandomErasing) -> Tensor:
    """Rotate by up to 12 degrees, scale by up to 12 %, shift by up to 8 %, then erase a patch or none."""
    count = len(images)
    angle, shift = (torch.rand(count) - 0.5) * math.radians(24), (torch.rand(count, 2) - 0.5) * 0.32
    scale = 1 + (torch.rand(count) - 0.5) * 0.24
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    matrix = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], dim=1).view(count, 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    erased: Tensor = erase(moved)
    return erased


def fit(model: nn.Module, data: tuple[Tensor, Tensor], check: tuple[Tensor, Tensor], stage: Stage) -> None:
    """One stage of AdamW with label smoothing 0.1; prints the loss and the accuracy on `check`."""
    images, labels = data
    erase = RandomErasing(probability=0.25, max_area=0.15, mode="const", device="cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=stage.rate, weight_decay=0.05)
    steps = math.ceil(len(images) / BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step / steps, stage))
    for epoch in range(stage.epochs):
        start, total = time.perf_counter(), 0.0
        model.train()
        for index in torch.tensor_split(torch.randperm(len(images)), steps):
            loss = F.cross_entropy(model(augment(images[index], erase)), labels[index], label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(index)
        if epoch % 10 == 9 or epoch == stage.epochs - 1:
            print(
                f"{stage.size}px epoch {epoch + 1:3d}  loss {total / len(images):.4f}  "
                f"calibration top-1 {top1(model, *check):.4f}  {time.perf_counter() - start:.1f} s",
                flush=True,
            )


def rate_at(epoch: float, stage: Stage) -> float:
    """Share of the stage's learning rate at a fractional epoch."""
    if epoch < stage.warmup:
        return (epoch + 0.01) / stage.warmup
    done = (epoch - stage.warmup) / (stage.epochs - stage.warmup)
    return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


@torch.inference_mode()
def top1(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Fraction of images whose highest logit is the label."""
    model.eval()
    logits = torch.cat([model(part) for part in torch.tensor_split(images, math.ceil(len(images) / 100))])
    return float((logits.argmax(1) == labels).double().mean())


def train(splits: tuple[Split, Split, Split], contract: Preprocessing) -> VisionTransformer:
    """The trained model at its final size."""
    torch.manual_seed(SEED)
    random.seed(SEED)  # RandomErasing draws from it
    model = VisionTransformer(**{**KWARGS, "img_size": STAGES[0].size}, drop_path_rate=0.05)
    for stage in STAGES:
        model.set_input_size((stage.size, stage.size))  # resamples the position embedding
        at = contract.at((stage.size, stage.size))
        fit(model, tensors(splits[0], at), tensors(splits[1], at), stage)
    return model


def training_statistics(split: Split) -> tuple[float, float]:
    """Mean and standard deviation of the training pixels on the 0..1 scale; grey, so one for all channels."""
    return round(float(split.images.mean() / 255), 3), round(float(split.images.std() / 255), 3)


def main() -> None:
    """Train, round the weights to float16, judge what was rounded, write the three files."""
    splits = load_splits()
    _, calib, held = splits
    mean, std = training_statistics(splits[0])
    size = (KWARGS["img_size"], KWARGS["img_size"])
    contract = Preprocessing(size, (mean,) * 3, (std,) * 3, Interpolation.BICUBIC)
    trained = train(splits, contract)

    save_file({name: tensor.half() for name, tensor in trained.state_dict().items()}, DIGITS_VIT_WEIGHTS)
    model = VisionTransformer(**KWARGS)
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(DIGITS_VIT_WEIGHTS).items()})
    score = top1(model, *tensors(held, contract))

    np.savez_compressed(
        DIGITS_IMAGES,
        calib_images=calib.images,
        calib_labels=calib.labels,
        eval_images=held.images,
        eval_labels=held.labels,
    )
    config = {
        "name": "digits-vit",
        "timm_kwargs": KWARGS,
        "preprocessing": {
            "size": list(size),
            "mean": [mean] * 3,
            "std": [std] * 3,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
        },
        "classes": [str(digit) for digit in range(10)],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "top1": score,
        "evaluation_images": len(held.labels),
        "licence": "Weights: Apache-2.0, as vit-export. Images: CC BY 4.0.",
        "source": "Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine "
        "Learning Repository, as shipped by scikit-learn (load_digits), enlarged from 8x8 to 32x32.",
        "trained_by": f"data/training/train_digits_vit.py, seed {SEED}, "
        f"torch {torch.__version__.split('+')[0]}, timm {timm.__version__}",
    }
    DIGITS_VIT_CONFIG.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for path in (DIGITS_VIT_WEIGHTS, DIGITS_IMAGES):
        print(f"{Path(path).name}: {path.stat().st_size:,} bytes")
    print(f"evaluation top-1 {score:.4f} on {len(held.labels)} images")


if __name__ == "__main__":
    main()
