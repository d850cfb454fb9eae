"""The stages as functions: quantise a timm model for OpenVINO, keeping its classifier float.

python examples/python_api.py PHOTOS OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

from vit_export.artifacts import BuildRequest, Precision
from vit_export.calibration.images import open_images
from vit_export.calibration.observers import MinMaxConfig
from vit_export.pipeline import (
    adapt,
    batches,
    calibrate,
    export,
    load,
    make_plan,
    target_named,
    trace,
    write_pixels,
)


def main(photos: Path, out: Path) -> None:
    """Calibrate on up to 64 photographs and write out/model.xml."""
    out.mkdir(parents=True, exist_ok=True)
    model = adapt(load("timm:deit_tiny_patch16_224"), (192, 192))
    program = trace(model)
    images = write_pixels(open_images(photos, limit=64), model.preprocessing, out / "calib.npy")
    ranges = calibrate(program, batches(images, 8), MinMaxConfig())
    plan = make_plan(ranges, program.layers, keep_float=["head"])
    request = BuildRequest(Precision.INT8, out, model.preprocessing)
    artifact = export(program, plan, target_named("openvino"), request)
    print(f"{artifact.path}: {artifact.size_bytes / 1e6:.1f} MB, float: {', '.join(plan.kept_float())}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
