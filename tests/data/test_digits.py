"""The embedded default is what its config says, and works as well as it says."""

from __future__ import annotations

import importlib.util
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from timm.models.vision_transformer import VisionTransformer

from vit_export.artifacts import Interpolation, Preprocessing
from vit_export.calibration.images import open_images
from vit_export.calibration.preprocess import to_pixels
from vit_export.data import DIGITS_IMAGES, DIGITS_VIT_WEIGHTS, digits_vit_config


@pytest.fixture(scope="module")
def model() -> VisionTransformer:
    """Built from the config, float32 weights, every key of the file used."""
    built = VisionTransformer(**digits_vit_config()["timm_kwargs"]).eval()
    built.load_state_dict({name: tensor.float() for name, tensor in load_file(DIGITS_VIT_WEIGHTS).items()})
    return built


@pytest.fixture(scope="module")
def contract() -> Preprocessing:
    facts = digits_vit_config()["preprocessing"]
    return Preprocessing(
        tuple(facts["size"]),
        tuple(facts["mean"]),
        tuple(facts["std"]),
        Interpolation(facts["interpolation"]),
        facts["crop_pct"],
    )


def test_files_are_small() -> None:
    """Weights at most 4 MB, images below 1 MB."""
    assert DIGITS_VIT_WEIGHTS.stat().st_size <= 4_000_000 and DIGITS_IMAGES.stat().st_size <= 1_000_000


def test_top1_is_what_the_config_says(model: VisionTransformer, contract: Preprocessing) -> None:
    """FP32 accuracy on the 500 evaluation images is the stated figure (to one image) and at least 0.97."""
    source = open_images(DIGITS_IMAGES, split="eval")
    pixels = np.stack([to_pixels(image, contract) for image in source.images()])  # type: ignore[arg-type]
    with torch.inference_mode():
        logits = torch.cat(
            [model(torch.from_numpy(part)) for part in np.split(contract.normalize(pixels), 10)]
        )
    score = float((logits.argmax(1).numpy() == source.labels).mean())
    assert abs(score - digits_vit_config()["top1"]) <= 1 / 500 + 1e-9 and score >= 0.97


def test_config_counts_its_parameters_and_classes(model: VisionTransformer) -> None:
    """The parameters are those of the model; ten classes for ten outputs; sources and licences are named."""
    config = digits_vit_config()
    assert config["parameters"] == sum(p.numel() for p in model.parameters())
    assert len(config["classes"]) == model.num_classes == 10
    assert "CC BY 4.0" in config["licence"] and "scikit-learn" in config["source"]
    assert json.loads(json.dumps(config)) == config


def test_images_are_the_digits_without_overlap() -> None:
    """200 and 500 stratified images, each a digit of scikit-learn with its label, none in both splits."""
    digits = load_digits()
    labels_of = {}
    for digit, label in zip(digits.images, digits.target, strict=True):
        scan = Image.fromarray(np.round(digit * (255 / 16)).astype(np.uint8))
        stored = scan.resize((32, 32), Image.Resampling.BICUBIC).convert("RGB")
        labels_of[stored.tobytes()] = int(label)
    seen: set[bytes] = set()
    for split, count in {"calib": 200, "eval": 500}.items():
        source = open_images(DIGITS_IMAGES, split=split)
        contents = list(source.contents())
        assert len(contents) == count and source.labels is not None
        assert [labels_of[content] for content in contents] == source.labels.tolist()
        assert np.ptp(np.bincount(source.labels)) <= 0.03 * count
        assert not seen & set(contents)
        seen |= set(contents)
    assert len(seen) == 700


def test_the_script_splits_into_the_shipped_images() -> None:
    """The training script's seeded split is the shipped one, and its training images are in neither set."""
    spec = importlib.util.spec_from_file_location(
        "train", DIGITS_IMAGES.parent / "training/train_digits_vit.py"
    )
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # its dataclasses look their module up
    spec.loader.exec_module(script)
    train, calib, held = script.load_splits()
    shipped: set[bytes] = set()
    for split, made in {"calib": calib, "eval": held}.items():
        source = open_images(DIGITS_IMAGES, split=split)
        np.testing.assert_array_equal(made.labels, source.labels)
        assert [image.tobytes() for image in made.images] == list(source.contents())
        shipped |= set(source.contents())
    assert len(train.images) == 1097 and not shipped & {image.tobytes() for image in train.images}
