"""The examples run as they are written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_python_api(tmp_path: Path) -> None:
    """The stages called one by one give an OpenVINO model with the layer it promises float."""
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for index in range(4):
        pixels = rng.integers(0, 256, (200, 220, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"photos/{index}.jpg")
    command = [sys.executable, EXAMPLES / "python_api.py", tmp_path / "photos", tmp_path / "out"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "model.xml" in run.stdout and "float: head" in run.stdout
    assert (tmp_path / "out/model.bin").stat().st_size > 5_000_000
