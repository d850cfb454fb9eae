"""Quantised candidates against the float network, on calibration images that calibration did not use."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.fx import GraphModule

from vit_export.artifacts import Images, Logits, Program, QuantPlan, TargetProfile
from vit_export.export.fake_quant import fake_quantized
from vit_export.export.quantize import quantize
from vit_export.runtime.accuracy import compare


@dataclass(frozen=True, slots=True)
class Score:
    """sqnr_db: of the outputs (inf without error); agreement: share of images with float's class."""

    sqnr_db: float
    agreement: float


@dataclass(slots=True, eq=False)
class Judge:
    """Runs candidates on `batches` under one target profile. Outputs of the float program are kept."""

    program: Program
    batches: Iterable[Images]
    profile: TargetProfile
    embeddings: bool = False
    seen: Callable[[], None] = lambda: None  # called after each candidate
    reference: Logits = field(init=False)

    def __post_init__(self) -> None:
        self.reference = run(self.program, self.program.graph, self.batches)

    def score(self, program: Program, plan: QuantPlan) -> Score:
        """How the quantised program compares with the float one."""
        logits = run(program, fake_quantized(quantize(program, plan, self.profile)), self.batches)
        found = compare(self.reference, logits, embeddings=self.embeddings, resamples=1)
        self.seen()
        sqnr = np.inf if found.sqnr_db is None else found.sqnr_db
        return Score(float(sqnr), found.agreement)


def run(program: Program, graph: GraphModule, batches: Iterable[Images]) -> Logits:
    """The outputs of a graph made from `program`, float32 [N, K]; a fixed batch is filled up by repeating."""
    found = []
    with torch.inference_mode():
        for images in batches:
            short = not program.dynamic_batch and len(images) < program.batch_size
            whole = np.resize(images, (program.batch_size, *images.shape[1:])) if short else images
            found.append(graph(torch.from_numpy(whole)).numpy()[: len(images)])
    return np.concatenate(found)
