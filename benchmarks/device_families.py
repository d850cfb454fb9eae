"""Every family at its real size, as Core ML packages and TensorRT engines: what holds of the issue's limits.

    python benchmarks/device_families.py coreml [FAMILY ...]
    python benchmarks/device_families.py tensorrt [FAMILY ...]

Real architectures at their native resolution and at another, weights random (seeded, so that every block
contributes): numbers of the arithmetic, not of a trained model. Core ML packages run in the reference
interpreter, which is not Apple's runtime; TensorRT-RTX builds engines without a GPU, and their graphs run in
ONNX Runtime node by node with float16 rounded. Exits 1 where a limit is missed. `pytest -m slow tests/trt
tests/coreml` goes through more combinations on small members of the same families.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vit_export.artifacts import BuildRequest, Images, LoadedModel, Logits, Precision, Program, Size
from vit_export.calibration.collect import calibrate
from vit_export.calibration.observers import MinMaxConfig
from vit_export.calibration.plan import plan as make_plan
from vit_export.errors import VitExportError
from vit_export.export.program import trace
from vit_export.export.quantize import quantize
from vit_export.export.target import Target
from vit_export.export.targets.coreml_package import CoreMLTarget
from vit_export.export.targets.tensorrt_engine import TensorRtTarget
from vit_export.models import adapt, load
from vit_export.runtime.accuracy import sqnr_db
from vit_export.runtime.runner import open_runner

FP32, FP16, INT8 = Precision.FP32, Precision.FP16, Precision.INT8
IMAGES = 2


@dataclass(frozen=True, slots=True)
class Family:
    """A model as the command line names it (`hf:` with a configuration class made here), and another size."""

    spec: str
    other: Size | None = None


FAMILIES: Mapping[str, Family] = {
    "vit": Family("timm:vit_tiny_patch16_224", (288, 224)),
    "deit": Family("timm:deit_tiny_distilled_patch16_224", (192, 256)),
    "dinov2": Family("timm:vit_small_patch14_dinov2", (224, 224)),
    "pvt_v2": Family("timm:pvt_v2_b0", (256, 192)),
    "swin": Family("timm:swin_tiny_patch4_window7_224", (256, 256)),
    "beit": Family("timm:beit_base_patch16_224", (192, 192)),
    "pvt": Family("hf:Pvt", (256, 256)),
    "hf-vit": Family("hf:ViT"),
    "hf-deit": Family("hf:DeiT"),
    "hf-dinov2": Family("hf:Dinov2"),
    "hf-beit": Family("hf:Beit"),
    "hf-swin": Family("hf:Swin"),
}


@dataclass(frozen=True, slots=True)
class Case:
    """One artifact: options of its target, its limit, and how its loss is told from PyTorch's outputs."""

    name: str
    precision: Precision
    options: Mapping[str, object]
    limit: float
    error: bool = False  # a largest relative error instead of dB
    planned: bool = False  # dB against the quantised program's own, which may be passed by 1 dB
    batch: int | None = None


COREML = (
    Case("FP32", FP32, {}, 1e-5, error=True),
    Case("FP16", FP16, {}, 5e-3, error=True),
    Case("int8 weights", INT8, {"weights": "int8"}, 30.0),
    Case("W8A8", INT8, {}, -1.0, planned=True),
)
TENSORRT = (
    Case("FP16", FP16, {"trt_flavor": "rtx"}, 55.0),
    Case("FP16, batch 2", FP16, {"trt_flavor": "rtx"}, 55.0, batch=2),
    Case("int8", INT8, {"trt_flavor": "rtx"}, -1.0, planned=True),
    Case("int8, batch 2", INT8, {"trt_flavor": "rtx"}, -1.0, planned=True, batch=2),
)
TARGETS: Mapping[str, tuple[Callable[[], Target], tuple[Case, ...]]] = {
    "coreml": (CoreMLTarget, COREML),
    "tensorrt": (TensorRtTarget, TENSORRT),
}


def loaded(family: Family, folder: Path) -> LoadedModel:
    """The model with seeded weights, biases and norms moved off their zeros and ones."""
    torch.manual_seed(0)
    spec = family.spec
    if spec.startswith("hf:"):
        import transformers

        name = spec.removeprefix("hf:")
        config = getattr(transformers, f"{name}Config")()
        getattr(transformers, f"{name}ForImageClassification")(config).save_pretrained(folder / name)
        spec = f"hf:{folder / name}"
    model = load(spec)
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def in_torch(module: torch.nn.Module, images: Images) -> Logits:
    """PyTorch's outputs, image by image."""
    with torch.inference_mode():
        logits: Logits = torch.cat(
            [module(torch.from_numpy(images[i : i + 1])) for i in range(len(images))]
        ).numpy()
    return logits


def rows(
    model: LoadedModel, target: Target, cases: tuple[Case, ...], folder: Path
) -> Iterator[tuple[str, bool]]:
    """(a line of the table, whether it holds) for each case at the model's size."""
    rng = np.random.default_rng(0)
    images, seen = (
        rng.standard_normal((n, 3, *model.image_size)).astype(np.float32) for n in (IMAGES, 2 * IMAGES)
    )
    program = trace(model)
    reference = in_torch(program.graph, images)
    ranges = calibrate(program, [seen[i : i + 1] for i in range(len(seen))], MinMaxConfig())
    for index, case in enumerate(cases):
        source = program
        if case.precision is INT8:
            plan = make_plan(ranges, program.layers, weights=case.options.get("weights"))
            source = quantize(program, plan, target.profile(INT8, case.options))
        try:
            yield _measured(model, target, case, source, images, seen, reference, folder / str(index))
        except VitExportError as error:
            yield f"{case.name:14} {type(error).__name__}: {error}", False


def _measured(
    model: LoadedModel,
    target: Target,
    case: Case,
    source: Program,
    images: Images,
    seen: Images,
    reference: Logits,
    folder: Path,
) -> tuple[str, bool]:
    request = BuildRequest(
        case.precision, folder, model.preprocessing,
        batch_size=case.batch, samples=seen, samples_are="images of noise", options=case.options,
    )  # fmt: skip
    began = time.perf_counter()
    artifact = target.build(source, request)
    seconds = time.perf_counter() - began
    runnable = target.lowered(artifact, 1, folder) or target.runnable(artifact, 1)
    with open_runner(runnable) as runner:
        logits = runner.infer(images, batch=case.batch or 1)
    facts = [f"{artifact.size_bytes / 1e6:.1f} MB", f"built in {seconds:.0f} s"]
    if artifact.details.get("not_built"):
        return f"{case.name:14} no engine: {artifact.details['not_built']}", False
    if "warnings" in artifact.details:
        facts.append(f"{len(artifact.details['warnings'])} warnings")
    found, words = _loss(case, source, images, reference, logits)
    holds = found <= case.limit if case.error else found >= case.limit
    return f"{case.name:14} {words:38} {', '.join(facts)}{'' if holds else '  MISSED'}", holds


def _loss(
    case: Case, source: Program, images: Images, reference: Logits, logits: Logits
) -> tuple[float, str]:
    """What is compared with the limit, and in words."""
    if case.error:
        error = float(np.abs(reference - logits).max() / np.abs(reference).max())
        return error, f"{error:.1e} of {case.limit:g}"
    reached = sqnr_db(reference, logits)
    reached = float("inf") if reached is None else reached
    if not case.planned:
        return reached, f"{reached:.1f} dB of {case.limit:g}"
    planned = sqnr_db(reference, in_torch(source.graph, images)) or float("inf")
    return reached - planned, f"{reached:.1f} dB, the plan in PyTorch {planned:.1f}"


def main() -> None:
    """Print the table; see the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=", ".join(FAMILIES))
    arguments = parser.parse_args()
    make, cases = TARGETS[arguments.target]
    held = True
    for name in arguments.families or FAMILIES:
        family = FAMILIES[name]
        with tempfile.TemporaryDirectory() as folder:
            native = loaded(family, Path(folder))
            for size in filter(None, (native.image_size, family.other)):
                model = native if size == native.image_size else adapt(native, size)
                for line, holds in rows(model, make(), cases, Path(folder) / f"{size}"):
                    print(f"{name:10} {size[0]}x{size[1]}  {line}", flush=True)
                    held &= holds
    sys.exit(not held)


if __name__ == "__main__":
    main()
