"""Which stage an artifact's loss comes from: each stage's outputs against those of the stage before it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vit_export.artifacts import (
    BuiltArtifact,
    EvalSet,
    LoadedModel,
    Logits,
    Precision,
    Program,
    Runnable,
    TargetProfile,
)
from vit_export.build_size import Calibrated
from vit_export.calibration.images import ImageSource
from vit_export.calibration.preprocess import Batches
from vit_export.export.fake_quant import fake_quantized
from vit_export.export.half_stored import half_stored
from vit_export.export.quantize import quantize
from vit_export.export.target import Target
from vit_export.job import ExportJob, first_images
from vit_export.runtime.accuracy import compare
from vit_export.runtime.inference import Prediction
from vit_export.runtime.report_schema import StageLoss
from vit_export.search.judge import run as run_batches
from vit_export.stage_keys import key, tensors_digest
from vit_export.stages import Stages
from vit_export.store import Key

_IMAGES = 32  # on which losses are split by stage

Predict = Callable[[str, Runnable, EvalSet], Prediction]


@dataclass(frozen=True, slots=True)
class Blame:
    """Splits the losses of the artifacts of one image size.

    digest: of `program`, as traced. reference: the baseline's outputs for `images`. predict: runs a named
    artifact on images.
    """

    job: ExportJob
    stages: Stages
    work: Path
    program: Program
    digest: str
    calibration: Calibrated | None
    images: EvalSet
    reference: Logits
    predict: Predict
    embeddings: bool

    def split(
        self, target: Target, artifact: BuiltArtifact, final: Logits | None
    ) -> tuple[tuple[StageLoss, ...], Logits | None]:
        """What float16, quantisation, lowering and the runtime each cost, on the first images.

        final: what the runtime answered, None where it is not here. Also the outputs of the lowered graph,
        where the target has one. Nothing for FP32 that was run.
        """
        if artifact.precision is Precision.FP32 and final is not None:
            return (), None
        few = self._few()
        profile = target.profile(artifact.precision, {**self.job.options, "opset": self.job.opset})
        steps: list[tuple[str, Logits]] = []
        if profile.rest == "float16":
            steps.append(("fp16", self._in_torch(None, profile, few)))
        if artifact.precision is Precision.INT8 and self.calibration is not None:
            steps.append(("quantize", self._in_torch(self.calibration, profile, few)))
        lowered = target.lowered(artifact, self.job.threads, self.work)
        graph = None
        if lowered is not None:
            name = f"{artifact.target} {artifact.precision} unoptimised"
            graph = self.predict(name, lowered, few).logits
            steps.append(("lower", graph))
        if final is not None:
            steps.append(("runtime", final[: few.count]))
        before, losses = self.reference[: few.count], []
        for stage, logits in steps:
            losses.append(self._loss(stage, before, logits))
            before = logits
        return tuple(losses), graph

    def resized(self, native: LoadedModel, source: ImageSource) -> tuple[StageLoss, ...]:
        """How far this size's FP32 answers are from those of the model at its own size, to the same images.

        No error, as those of the other stages are: the network sees other pixels. Nothing at its own size.
        """
        if native.image_size == self.images.preprocessing.size:
            return ()
        few = self.stages.pixels(
            "images at the model's own size", source.take(range(min(_IMAGES, len(source)))),
            native.preprocessing, self.work / "native-images",
        )  # fmt: skip
        decided = key(
            "native", model=native.spec, code=self.digest, images=few.digest,
            weights=tensors_digest(sorted(native.module.state_dict().items())),
        )  # fmt: skip
        logits = self._kept("the model at its own size", decided, lambda: _native(native, few))
        return (self._loss("resize", logits, self.reference[: len(logits)]),)

    def _loss(self, stage: str, before: Logits, after: Logits) -> StageLoss:
        found = compare(before, after, embeddings=self.embeddings, resamples=1)
        return StageLoss(stage=stage, sqnr_db=found.sqnr_db, agreement=found.agreement)

    def _few(self) -> EvalSet:
        height, width = self.images.preprocessing.size
        return first_images(self.images, _IMAGES, self.work / f"few-{height}x{width}.npy")

    def _in_torch(self, known: Calibrated | None, profile: TargetProfile, images: EvalSet) -> Logits:
        """What the program says in PyTorch: quantised if `known`, in float16 where the target's rest is."""
        decided = key(
            "in torch", program=self.digest, calibration=known.digest if known else "none",
            plan=known.plan if known else "none", profile=profile if known else profile.rest,
            images=images.digest,
        )  # fmt: skip

        def make() -> Logits:
            program = quantize(known.program, known.plan, profile) if known else self.program
            graph = fake_quantized(program)
            return _run(program, half_stored(graph) if profile.rest == "float16" else graph, images)

        return self._kept("quantized in PyTorch" if known else "float16 in PyTorch", decided, make)

    def _kept(self, name: str, decided: Key, make: Callable[[], Logits]) -> Logits:
        folder = self.work / f"in-torch-{decided.digest[:16]}"
        self.stages.once(name, decided, folder, lambda _: np.save(folder / "logits.npy", make()))
        logits: Logits = np.load(folder / "logits.npy", allow_pickle=False)
        return logits


def _run(program: Program, graph: Callable[[Tensor], Tensor], images: EvalSet) -> Logits:
    return run_batches(program, graph, Batches(images, 8 if program.dynamic_batch else program.batch_size))


def _native(model: LoadedModel, images: EvalSet) -> Logits:
    """One image at a time: some models take no other batch."""
    with torch.inference_mode():
        found = [model.module(torch.from_numpy(image)).numpy() for image in Batches(images, 1)]
    return np.concatenate(found)
