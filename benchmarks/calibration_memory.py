"""Peak memory of calibration at 32 and 512 images: it must be flat.

    python benchmarks/calibration_memory.py [--model digits-vit|TIMM_NAME ...] [--method minmax ...]

Each figure comes from a process of its own: trace the model, reset the kernel's high-water mark, calibrate
in batches of 8, read the mark (VmHWM; Linux only). Weights of timm models are random, images are digits.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

COUNTS = (32, 512)
BATCH = 8


@dataclass(frozen=True, slots=True)
class Usage:
    """Mebibytes resident before and at the peak of calibration, and its seconds."""

    before: float
    peak: float
    seconds: float


def status(field: str) -> float:
    """A field of /proc/self/status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def load(name: str) -> Any:
    """The embedded default or a timm model with random weights, as a LoadedModel."""
    import timm
    from safetensors.torch import load_file

    from vit_export.artifacts import LoadedModel, Positions, Preprocessing
    from vit_export.data import DIGITS_VIT_WEIGHTS, digits_vit_config

    if name == "digits-vit":
        module = timm.models.vision_transformer.VisionTransformer(**digits_vit_config()["timm_kwargs"])
        module.load_state_dict({key: value.float() for key, value in load_file(DIGITS_VIT_WEIGHTS).items()})
    else:
        module = timm.create_model(name)
    size = module.patch_embed.img_size
    return LoadedModel(module.eval(), name, "timm", Preprocessing(size), 10, size, (1, 1), Positions.ABSOLUTE)


def measure(name: str, count: int, method: str) -> Usage:
    """Calibrate in this process; memory of images, model and observers together."""
    from vit_export.calibration.collect import calibrate
    from vit_export.calibration.images import open_images
    from vit_export.calibration.observers import METHODS
    from vit_export.calibration.preprocess import batches, write_pixels
    from vit_export.data import DIGITS_IMAGES
    from vit_export.export.program import trace

    model = load(name)
    with tempfile.TemporaryDirectory() as folder:
        with np.load(DIGITS_IMAGES) as digits:
            np.savez(Path(folder, "set.npz"), images=np.resize(digits["eval_images"], (count, 32, 32, 3)))
        images = write_pixels(
            open_images(Path(folder, "set.npz")), model.preprocessing, Path(folder, "set.npy")
        )
        program = trace(model)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before, start = status("VmRSS"), time.perf_counter()
        ranges = calibrate(program, batches(images, BATCH), METHODS[method])
        seconds = time.perf_counter() - start
    assert ranges.images == count
    return Usage(before, status("VmHWM"), seconds)


def measured_apart(name: str, count: int, method: str) -> Usage:
    """`measure` in a fresh process."""
    command = [sys.executable, __file__, "--child", json.dumps([name, count, method])]
    shown = subprocess.run(command, check=True, capture_output=True, text=True)
    return Usage(**json.loads(shown.stdout.splitlines()[-1]))


def main() -> None:
    """Print one row a model, method and count."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", default=["digits-vit", "vit_small_patch16_224"])
    parser.add_argument("--method", nargs="+", default=["minmax", "mse"])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        usage = measure(*json.loads(arguments.child))
        print(json.dumps({"before": usage.before, "peak": usage.peak, "seconds": usage.seconds}))
        return
    print(
        f"{'model':24}{'method':12}{'images':>7}{'before MiB':>12}{'peak MiB':>10}{'added MiB':>11}{'s':>8}"
    )
    for name, method, count in product(arguments.model, arguments.method, COUNTS):
        usage = measured_apart(name, count, method)
        added = usage.peak - usage.before
        print(
            f"{name:24}{method:12}{count:7}{usage.before:12.1f}{usage.peak:10.1f}{added:11.1f}"
            f"{usage.seconds:8.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
