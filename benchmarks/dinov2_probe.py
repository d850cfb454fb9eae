"""A ten-class linear probe on real DINOv2-S weights, so that agreement and top-1 mean something.

    python benchmarks/photos.py PHOTOS
    python benchmarks/dinov2_probe.py dinov2_small.safetensors PHOTOS probe.safetensors

Fits ridge regression to the class token of PHOTOS/probe at 224 pixels and writes the backbone with it as
its head, for `examples/dinov2.py:classifier`. It sees neither calibration nor evaluation images.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import load_file, save_file

from vit_export.artifacts import Preprocessing
from vit_export.calibration.images import BadImage, open_images
from vit_export.calibration.preprocess import to_pixels

RIDGE = 10.0


def main(weights: Path, photos: Path, out: Path) -> None:
    """Write `out`."""
    state = load_file(weights)
    model = timm.create_model("vit_small_patch14_dinov2.lvd142m", img_size=518, num_classes=0)
    model.load_state_dict(state)
    model.set_input_size((224, 224))
    source, contract = open_images(photos / "probe"), Preprocessing((224, 224))
    assert source.labels is not None
    pixels = [to_pixels(image, contract) for image in source.images() if not isinstance(image, BadImage)]
    with torch.inference_mode():
        batches = (contract.normalize(np.stack(pixels[i : i + 16])) for i in range(0, len(pixels), 16))
        features = torch.cat([model.eval()(torch.from_numpy(batch)) for batch in batches]).double()
    targets = torch.nn.functional.one_hot(torch.from_numpy(source.labels)).double()
    mean = features.mean(0)
    gram = (features - mean).T @ (features - mean) + RIDGE * torch.eye(features.shape[1], dtype=torch.double)
    head = torch.linalg.solve(gram, (features - mean).T @ (targets - targets.mean(0)))
    bias = targets.mean(0) - mean @ head
    state["head.weight"], state["head.bias"] = head.T.contiguous().float(), bias.float()
    save_file(state, out)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
