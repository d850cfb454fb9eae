"""Quantised candidates against the float network, on calibration images that calibration did not use."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from vit_export.artifacts import Images, Labels, Logits, Program, QuantPlan, TargetProfile
from vit_export.calibration.preprocess import Batches
from vit_export.export.fake_quant import fake_quantized
from vit_export.export.quantize import quantize
from vit_export.runtime.accuracy import compare


@dataclass(frozen=True, slots=True)
class Score:
    """sqnr_db: of the outputs (inf without error); agreement: share of images with float's class.

    drop: points of top-1 lost, None without labels.
    """

    sqnr_db: float
    agreement: float
    drop: float | None = None

    @property
    def loss(self) -> float:
        """Points of top-1 lost; without labels the share of images that changed class, which bounds it."""
        return 100 * (1 - self.agreement) if self.drop is None else self.drop


@dataclass(slots=True, eq=False)
class Judge:
    """Runs candidates on `batches` under one target profile. Outputs of the float program are kept."""

    program: Program
    batches: Batches
    profile: TargetProfile
    embeddings: bool = False
    labels: Labels | None = None
    seen: Callable[[], None] = lambda: None  # called after each candidate
    reference: Logits = field(init=False)

    def __post_init__(self) -> None:
        self.reference = run(self.program, self.program.graph, self.batches)

    def first(self, count: int) -> Judge:
        """A judge by the first images alone."""
        few = self.batches.take(range(min(count, self.batches.count)))
        return Judge(self.program, few, self.profile, self.embeddings, few.labels)

    def score(self, program: Program, plan: QuantPlan) -> Score:
        """How the quantised program compares with the float one."""
        logits = run(program, fake_quantized(quantize(program, plan, self.profile)), self.batches)
        found = compare(self.reference, logits, self.labels, embeddings=self.embeddings, resamples=1)
        self.seen()
        sqnr = np.inf if found.sqnr_db is None else found.sqnr_db
        return Score(float(sqnr), found.agreement, found.top1_drop)


def run(program: Program, graph: Callable[[Tensor], Tensor], batches: Iterable[Images]) -> Logits:
    """The outputs of a graph made from `program`, float32 [N, K]; a fixed batch is filled up by repeating."""
    found = []
    with torch.inference_mode():
        for images in batches:
            short = not program.dynamic_batch and len(images) < program.batch_size
            whole = np.resize(images, (program.batch_size, *images.shape[1:])) if short else images
            found.append(graph(torch.from_numpy(whole)).numpy()[: len(images)])
    return np.concatenate(found)
