"""What Core ML packages cost DINOv2-S: size and accuracy of every precision, from the saved files.

    python benchmarks/photos.py PHOTOS
    python benchmarks/dinov2_probe.py dinov2_small.safetensors PHOTOS probe.safetensors
    python benchmarks/coreml_dinov2.py probe.safetensors PHOTOS

Real weights with a ten-class probe at 224 px, calibrated with plain min-max on photographs that are not
evaluated. Every package runs in the reference interpreter, which is not Apple's runtime: the numbers are
those of the arithmetic that the package declares, and there is no latency. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vit_export.artifacts import (
    BuildRequest,
    BuiltArtifact,
    Images,
    Labels,
    LoadedModel,
    Logits,
    Positions,
    Precision,
    Preprocessing,
    Program,
    Ranges,
)
from vit_export.calibration.collect import calibrate
from vit_export.calibration.images import BadImage, open_images
from vit_export.calibration.observers import MinMaxConfig
from vit_export.calibration.plan import plan as make_plan
from vit_export.calibration.preprocess import to_pixels
from vit_export.export.program import trace
from vit_export.export.quantize import quantize
from vit_export.export.targets.coreml_package import CoreMLTarget
from vit_export.models import adapt
from vit_export.runtime.accuracy import compare, sqnr_db
from vit_export.runtime.runner import open_runner

FP32, FP16, INT8 = Precision.FP32, Precision.FP16, Precision.INT8
TARGET = CoreMLTarget()
IMAGE = {"coreml_input": "image"}
SIZES = ((224, 224), (280, 280), (336, 336))


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: what it is called, its precision and its options."""

    name: str
    precision: Precision
    options: dict[str, object]


ROWS = (
    Row("FP32", FP32, {}),
    Row("FP16", FP16, {}),
    Row("FP16, image input", FP16, IMAGE),
    Row("FP16, iOS 17", FP16, {"coreml_target": "iOS17"}),
    Row("int8 weights", INT8, {"weights": "int8"}),
    Row("int4 weights", INT8, {"weights": "int4"}),
    Row("W8A8, asymmetric (default)", INT8, {}),
    Row("W8A8, symmetric", INT8, {"coreml_activations": "symmetric"}),
    Row("6-bit palette", FP16, {"palettize": 6}),
    Row("4-bit palette", FP16, {"palettize": 4}),
    Row("4-bit palette, iOS 17", FP16, {"palettize": 4, "coreml_target": "iOS17"}),
    Row("4-bit palette, int8 activations", INT8, {"palettize": 4}),
)


def load(checkpoint: Path) -> LoadedModel:
    """DINOv2-S with its probe, taken from 518 to 224 px."""
    import timm
    from safetensors.torch import load_file

    module = timm.create_model("vit_small_patch14_dinov2.lvd142m", img_size=518, num_classes=10)
    module.load_state_dict(load_file(checkpoint))
    native = LoadedModel(
        module=module.eval(), spec="dinov2-s", family="vit", preprocessing=Preprocessing((518, 518)),
        num_classes=10, source_image_size=(518, 518), multiple=(14, 14), positions=Positions.ABSOLUTE,
    )  # fmt: skip
    return adapt(native, SIZES[0])


def read(folder: Path, contract: Preprocessing, every: int = 1) -> tuple[Images, Labels | None]:
    """Every n-th image of a folder, normalised, and its class."""
    source = open_images(folder)
    kept = [(i, image) for i, image in enumerate(source.images()) if i % every == 0]
    pixels = [to_pixels(image, contract) for _, image in kept if not isinstance(image, BadImage)]
    labels = None if source.labels is None else source.labels[[i for i, _ in kept]]
    return contract.normalize(np.stack(pixels)), labels


def in_torch(module: torch.nn.Module, images: Images) -> Logits:
    """PyTorch's outputs, 16 images at a time."""
    with torch.inference_mode():
        parts = [module(torch.from_numpy(images[i : i + 16])) for i in range(0, len(images), 16)]
    logits: Logits = torch.cat(parts).numpy()
    return logits


def prepare(model: LoadedModel, ranges: Ranges, row: Row) -> Program:
    """The program of one row, with Q/DQ for int8."""
    program = trace(model)
    if row.precision is not INT8:
        return program
    plan = make_plan(ranges, program.layers, weights=row.options.get("weights"))
    return quantize(program, plan, TARGET.profile(INT8, row.options))


def build(model: LoadedModel, program: Program, row: Row, folder: Path) -> BuiltArtifact:
    """The package of one row at the model's size."""
    metadata = {"model": model.spec}
    request = BuildRequest(row.precision, folder, model.preprocessing, metadata=metadata, options=row.options)
    return TARGET.build(program, request)


def table(
    model: LoadedModel,
    ranges: Ranges,
    images: Images,
    labels: Labels | None,
    rows: Sequence[Row],
    folder: Path,
) -> Iterator[str]:
    """Lines of the table, each printed when it is done."""
    reference = in_torch(model.module, images)
    yield (
        "| package | MB | SQNR dB | plan in PyTorch dB | agreement | top-1 | max relative "
        "| compressed | left float |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for index, row in enumerate(rows):
        began = time.perf_counter()
        program = prepare(model, ranges, row)
        artifact = build(model, program, row, folder / str(index))
        built = time.perf_counter() - began
        with open_runner(TARGET.runnable(artifact, 1)) as runner:
            began = time.perf_counter()
            logits = runner.infer(images)
            each = (time.perf_counter() - began) / len(images)
        accuracy = compare(reference, logits, labels)
        planned = "-"
        if row.precision is INT8 and "palettize" not in row.options:
            planned = f"{sqnr_db(reference, in_torch(program.graph, images)):.1f}"
        relative = np.abs(reference - logits).max() / np.abs(reference).max()
        details = artifact.details
        compressed = f"{details['compressed_weights']}/{details['weights']}" if "weights" in details else "-"
        left = ", ".join((*details.get("float_weights", ()), *details.get("float_constants", ())))
        yield (
            f"| {row.name} | {artifact.size_bytes / 1e6:.1f} | {accuracy.sqnr_db:.1f} | {planned} "
            f"| {accuracy.agreement:.3f} | {accuracy.top1:.3f} | {relative:.1e} "
            f"| {compressed} | {left or '-'} |"
        )
        print(f"{row.name}: built in {built:.0f} s, {each:.2f} s an image", file=sys.stderr)


def sizes(model: LoadedModel, ranges: Ranges, folder: Path) -> Iterator[str]:
    """Megabytes of one package for several sizes against one each."""
    for row in (Row("FP16", FP16, IMAGE), Row("W8A8", INT8, IMAGE)):
        models = [adapt(model, size) for size in SIZES]
        single = [
            build(m, prepare(m, ranges, row), row, folder / f"{row.name}{m.image_size}") for m in models
        ]
        together = TARGET.share(single, folder / row.name)[0].size_bytes
        names = ", ".join(f"{height}x{width}" for height, width in SIZES)
        apart = sum(artifact.size_bytes for artifact in single)
        yield f"{row.name} at {names}: one package {together / 1e6:.1f} MB, one each {apart / 1e6:.1f} MB"


def main() -> None:
    """Print the table and the sizes of multifunction packages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--every", type=int, default=4, help="evaluate every n-th image")
    parser.add_argument("--rows", default="", help="only rows whose name contains this")
    arguments = parser.parse_args()
    model = load(arguments.checkpoint)
    contract = model.preprocessing
    program = trace(model)
    calibration, _ = read(arguments.photos / "calib", contract)
    batches = (calibration[i : i + 8] for i in range(0, len(calibration), 8))
    ranges = calibrate(program, batches, MinMaxConfig())
    images, labels = read(arguments.photos / "eval", contract, arguments.every)
    reference = compare(in_torch(model.module, images), in_torch(model.module, images), labels)
    print(f"{len(images)} images, FP32 PyTorch top-1 {reference.top1:.3f}", flush=True)
    rows = [row for row in ROWS if arguments.rows in row.name]
    with tempfile.TemporaryDirectory() as folder:
        for line in table(model, ranges, images, labels, rows, Path(folder)):
            print(line, flush=True)
        if not arguments.rows:
            for line in sizes(model, ranges, Path(folder) / "sizes"):
                print(line, flush=True)


if __name__ == "__main__":
    main()
