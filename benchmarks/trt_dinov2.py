"""What TensorRT's graphs cost DINOv2-S: SQNR of the FP16 and the int8 graph against FP32 PyTorch.

Real weights (a timm checkpoint of vit_small_patch14_dinov2.lvd142m at 518 px, taken to 224) and views of
the photos that ship with scikit-image; half of the photos calibrate, the other half are judged. With a
folder of benchmarks/photos.py its calib/ calibrates and 24 images of its eval/ are judged instead. The
graphs run in ONNX Runtime without optimisation and with every float16 tensor rounded, so this is the
graph's own loss, not a runtime's.
Exits 1 below 55 dB (FP16) or 20 dB (int8 with plain min-max calibration).

    python benchmarks/trt_dinov2.py dinov2_small.safetensors [PHOTOS]
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from vit_export.artifacts import (
    BuildRequest,
    Images,
    LoadedModel,
    Logits,
    Positions,
    Precision,
    Preprocessing,
)
from vit_export.build_size import export
from vit_export.calibration.collect import calibrate
from vit_export.calibration.images import BadImage, open_images
from vit_export.calibration.observers import MinMaxConfig
from vit_export.calibration.plan import plan
from vit_export.calibration.preprocess import to_pixels
from vit_export.export.peaks import run_graph
from vit_export.export.program import trace
from vit_export.export.targets.tensorrt_engine import TensorRtTarget

LIMITS_DB = {Precision.FP16: 55.0, Precision.INT8: 20.0}
_JUDGED = 24
_PHOTOS = ("astronaut", "coffee", "chelsea", "rocket", "hubble_deep_field", "immunohistochemistry", "retina")


def photos(contract: Preprocessing) -> tuple[Images, Images]:
    """(calibration, judged): three crops and their mirror images of each photo, normalised."""
    from PIL import Image
    from skimage import data

    views: list[list[np.ndarray]] = [[], []]
    for index, name in enumerate(_PHOTOS):
        pixels = getattr(data, name)()[..., :3]
        side = min(pixels.shape[:2])
        for step in range(3):
            top, left = ((size - side) * step // 2 for size in pixels.shape[:2])
            crop = Image.fromarray(pixels[top : top + side, left : left + side])
            small = np.asarray(crop.resize(contract.size[::-1], Image.Resampling.BICUBIC))
            views[index % 2] += [small, small[:, ::-1]]
    calibration, judged = (contract.normalize(np.stack(part)) for part in views)
    return calibration, judged


def folders(contract: Preprocessing, photos: Path) -> tuple[Images, Images]:
    """(calibration, judged): all of PHOTOS/calib and every n-th image of PHOTOS/eval, normalised."""
    calibration, judged = (
        [
            to_pixels(image, contract)
            for image in open_images(photos / part).images()
            if not isinstance(image, BadImage)
        ]
        for part in ("calib", "eval")
    )
    every = max(1, len(judged) // _JUDGED)
    return contract.normalize(np.stack(calibration)), contract.normalize(np.stack(judged[::every][:_JUDGED]))


def load(checkpoint: Path) -> LoadedModel:
    """The backbone without a head at 224 px; its output is the class embedding."""
    import timm
    from safetensors.torch import load_file

    module = timm.create_model("vit_small_patch14_dinov2.lvd142m", img_size=518, num_classes=0)
    module.load_state_dict(load_file(checkpoint))
    module.set_input_size((224, 224))
    return LoadedModel(
        module=module.eval(), spec="dinov2-s", family="vit", preprocessing=Preprocessing((224, 224)),
        num_classes=0, source_image_size=(518, 518), multiple=(14, 14), positions=Positions.ABSOLUTE,
    )  # fmt: skip


def sqnr_db(reference: Logits, other: Logits) -> float:
    """10 log10 of signal over noise power, all outputs together."""
    noise = float(((reference.astype(np.float64) - other) ** 2).sum())
    return float(10 * np.log10((reference.astype(np.float64) ** 2).sum() / noise))


def results(
    model: LoadedModel, images: tuple[Images, Images]
) -> Iterator[tuple[str, Precision, float, dict[str, object]]]:
    """(what, precision, SQNR in dB, facts of the build) for each graph."""
    calibration, judged = images
    program = trace(model)
    target = TensorRtTarget()
    ranges = calibrate(
        program, [calibration[i : i + 8] for i in range(0, len(calibration), 8)], MinMaxConfig()
    )
    chosen = plan(ranges, program.layers)
    with torch.inference_mode():
        reference = program.graph(torch.from_numpy(judged)).numpy()
    runs: list[tuple[str, Precision, dict[str, object]]] = [
        ("FP16", Precision.FP16, {}),
        ("int8 linears, FP16 attention", Precision.INT8, {"int8_attention": "off"}),
        ("int8 linears, attention chosen", Precision.INT8, {"int8_attention": "auto"}),
        ("int8 linears and attention", Precision.INT8, {"int8_attention": "on"}),
    ]
    for what, precision, options in runs:
        with tempfile.TemporaryDirectory() as folder:
            request = BuildRequest(
                precision, Path(folder), model.preprocessing, samples=calibration[:4], options=options
            )
            artifact = export(program, chosen, target, request)
            answer = run_graph(artifact.path.with_suffix(".onnx"), judged, rounded=True)
            yield what, precision, sqnr_db(reference, answer), dict(artifact.details)


def main() -> None:
    """Print the table; see the module."""
    failed = False
    print(f"{'graph':32} {'SQNR dB':>8}  {'attention':46} {'float32 islands':>15}  build s")
    model = load(Path(sys.argv[1]))
    contract = model.preprocessing
    images = folders(contract, Path(sys.argv[2])) if len(sys.argv) > 2 else photos(contract)
    for what, precision, quality, details in results(model, images):
        kept, seconds = details["kept_float32"], details["build_seconds"]
        assert isinstance(kept, dict)
        words = str(details.get("int8_attention", ""))
        print(f"{what:32} {quality:8.1f}  {words:46} {len(kept):15}  {seconds}")
        failed |= quality < LIMITS_DB[precision] and "on)" not in words
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
