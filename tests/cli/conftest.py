"""One real export shared by the tests that read it, and photos."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of the default model in int8 on 300 images, enough to decide a point, built once."""
    import subprocess

    folder = tmp_path_factory.mktemp("exported") / "out"
    targets = ("--target", "onnx", "--target", "openvino", "--int8")
    subprocess.run(
        [sys.executable, "-m", "vit_export", *targets, "--eval-size", "300", "--output", str(folder)],
        check=True,
        cwd=folder.parent,
    )
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twenty PNG files of seeded noise in two class folders."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for index in range(20):
        path = tmp_path / "photos" / f"class{index % 2}" / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    return tmp_path / "photos"
