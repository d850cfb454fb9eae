"""Every family at its real size as an ONNX file: parity with the adapted module, export time, nodes.

    python benchmarks/families_full_size.py [NAME ...]

The architectures people deploy (the smallest published member of each family), with seeded random weights in
which LayerScale, biases and position tables are large enough to matter: this is about the graph, not about
accuracy. Each is exported at its native size, at a larger one and at one that is not square, and run in ONNX
Runtime on images that the export did not see. Parity is the largest difference over the largest output;
seconds are of the processor, one thread, for adapting, tracing and writing together. Prints a Markdown table;
exits 1 where parity is above 1e-4.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vit_export.artifacts import BuildRequest, BuiltArtifact, LoadedModel, Precision, Size
from vit_export.build_size import export
from vit_export.export.program import PARITY, trace
from vit_export.export.targets import target_named
from vit_export.models import adapt, load
from vit_export.runtime.runner import open_runner

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from contracts.families import randomize

ONNX = target_named("onnx")
IMAGES = 2


@dataclass(frozen=True, slots=True)
class Case:
    """A model as the command line names it (`hf:NAME`: NAMEConfig's defaults), and sizes besides its own."""

    family: str
    spec: str
    larger: Size = (288, 288)
    nonsquare: Size = (192, 256)


CASES = (
    Case("ViT", "timm:vit_small_patch16_224"),
    Case("DeiT distilled", "timm:deit_tiny_distilled_patch16_224"),
    Case("DeiT-III", "timm:deit3_small_patch16_224"),
    Case("DINO", "timm:vit_small_patch16_224.dino"),
    Case("DINOv2", "timm:vit_small_patch14_dinov2", (532, 532), (224, 280)),
    Case("DINOv2 registers", "timm:vit_small_patch14_reg4_dinov2", (532, 532), (224, 280)),
    Case("DINOv3", "timm:vit_small_patch16_dinov3"),
    Case("EVA-02", "timm:eva02_tiny_patch14_224", (280, 280), (196, 252)),
    Case("BEiT", "timm:beit_base_patch16_224"),
    Case("BEiTv2", "timm:beitv2_base_patch16_224"),
    Case("Swin", "timm:swin_tiny_patch4_window7_224", (256, 256), (256, 224)),
    Case("SwinV2", "timm:swinv2_tiny_window8_256", (384, 384), (256, 320)),
    Case("PVTv2", "timm:pvt_v2_b0"),
    Case("ViT", "hf:ViT"),
    Case("DeiT", "hf:DeiT"),
    Case("MAE encoder", "hf:ViTMAE"),
    Case("DINOv2", "hf:Dinov2", (280, 280), (196, 252)),
    Case("BEiT", "hf:Beit"),
    Case("PVT v1", "hf:Pvt"),
    Case("PVTv2", "hf:PvtV2"),
    Case("Swin", "hf:Swin", (256, 256), (256, 224)),
    Case("SwinV2", "hf:Swinv2", (288, 288), (192, 256)),
    Case("ViT", "torchvision:vit_b_16"),
    Case("Swin", "torchvision:swin_t", (256, 256), (256, 224)),
)
_HF_CLASSES: Mapping[str, str] = {"ViTMAE": "ViTMAEForPreTraining"}
_HF_SETTINGS: Mapping[str, Mapping[str, object]] = {"Beit": {"use_relative_position_bias": True}}


def loaded(spec: str, folder: Path) -> LoadedModel:
    """The model with its weights randomised; `hf:` from a folder with nothing but a config.json."""
    torch.manual_seed(0)
    if spec.startswith("hf:"):
        import transformers

        name = spec.removeprefix("hf:")
        architecture = _HF_CLASSES.get(name, f"{name}ForImageClassification")
        config = getattr(transformers, f"{name}Config")(
            architectures=[architecture], **_HF_SETTINGS.get(name, {})
        )
        config.save_pretrained(folder / name)
        spec = f"hf:{folder / name}"
    model = load(spec)
    randomize(model.module)
    return model


def images(size: Size) -> np.ndarray:
    """Seeded standard-normal float32 [IMAGES, 3, H, W]."""
    return np.random.default_rng(1).standard_normal((IMAGES, 3, *size), dtype=np.float32)


def parity(model: LoadedModel, artifact: BuiltArtifact) -> float:
    """max |module - file| / max |module|."""
    given = images(model.image_size)
    with torch.inference_mode():
        reference = model.module(torch.from_numpy(given)).numpy()
    with open_runner(ONNX.runnable(artifact, 1)) as runner:
        answer = runner.infer(given)
    return float(np.abs(reference - answer).max() / np.abs(reference).max())


def rows(case: Case) -> Iterator[tuple[str, bool]]:
    """(a line of the table, whether it holds) for each size."""
    with tempfile.TemporaryDirectory() as folder:
        native = loaded(case.spec, Path(folder))
        for size in (native.image_size, case.larger, case.nonsquare):
            began = time.process_time()
            model = native if size == native.image_size else adapt(native, size)
            request = BuildRequest(Precision.FP32, Path(folder) / f"{size}", model.preprocessing)
            artifact = export(trace(model), None, ONNX, request)
            seconds = time.process_time() - began
            found = parity(model, artifact)
            cells = (
                case.family, f"`{case.spec}`", f"{size[0]}x{size[1]}", f"{found:.0e}", f"{seconds:.0f}",
                artifact.details["nodes"],
            )  # fmt: skip
            yield f"| {' | '.join(map(str, cells))} |", found < PARITY


def main() -> None:
    """Print the table; see the module."""
    torch.set_num_threads(1)
    held = True
    print("| family | model | size | parity | export s | nodes |\n|---|---|---|---|---|---|")
    for case in CASES:
        if len(sys.argv) > 1 and case.spec not in sys.argv[1:]:
            continue
        for line, holds in rows(case):
            print(line, flush=True)
            held &= holds
    sys.exit(not held)


if __name__ == "__main__":
    main()
