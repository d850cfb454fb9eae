"""`--tune`: the options of each CPU artifact that are fastest on this machine, found by measuring.

Choice by choice (tuning_choices.py), each option runs against the best so far in alternating rounds, a
process each. It is taken if it is faster by more than the noise and answers as well: an option may cost half
a decibel. A choice that the budget does not reach keeps its default, and says so.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from vit_export.artifacts import BuiltArtifact, EvalSet, Logits, Precision, Runnable
from vit_export.build_size import SizeBuilder, Tuned
from vit_export.errors import VitExportError
from vit_export.export.target import Target
from vit_export.runtime.accuracy import sqnr_db
from vit_export.runtime.latency import alternate
from vit_export.runtime.protocol import ProgressCallback
from vit_export.runtime.report_schema import TuningStep
from vit_export.runtime.worker_client import Worker
from vit_export.tuning_choices import CHOICES, Choice, open_choices

FASTER = 1.02  # less is noise
MAY_LOSE_DB = 0.5
ENOUGH_DB = 60.0  # above it, differences are of rounding
_ROUNDS, _RUNS, _SECONDS = 4, 10, 1.5  # of each duel


@dataclass(slots=True)
class Tuner:
    """Tunes the artifacts of one image size.

    images: a few, on which options are judged; reference: the baseline's outputs [N, K] for them. work: a
    scratch folder. budget: seconds, of which each artifact may use its share of what is left.
    """

    builder: SizeBuilder
    images: EvalSet
    reference: Logits
    work: Path
    budget: float
    notify: ProgressCallback
    _deadline: float = 0.0
    _built: dict[str, BuiltArtifact] = field(default_factory=dict)

    def run(self) -> Mapping[tuple[str, Precision], Tuned]:
        """What was chosen, for every target with choices that runs here and every precision."""
        targets = [t for t in self.builder.targets if t.name in CHOICES and not t.not_timed()]
        pairs = list(product(targets, self.builder.job.precisions))
        end, found = time.monotonic() + self.budget, {}
        for done, (target, precision) in enumerate(pairs):
            now = time.monotonic()
            self._deadline = now + (end - now) / (len(pairs) - done)
            found[target.name, precision] = self._tune(target, precision)
        return found

    def _tune(self, target: Target, precision: Precision) -> Tuned:
        best = Tuned()
        choices = open_choices(self.builder.job, target.name, precision)
        for done, choice in enumerate(choices):
            self.notify(f"tune {target.name} {precision}", done, len(choices))
            for option in choice.options[1:]:
                candidate = _with(best, choice, option)
                step = self._duel(target, precision, best, candidate, choice, option)
                best = dataclasses.replace(candidate if step.taken else best, steps=(*best.steps, step))
        return best

    def _duel(
        self,
        target: Target,
        precision: Precision,
        best: Tuned,
        candidate: Tuned,
        choice: Choice,
        option: Any,
    ) -> TuningStep:
        """Whether `candidate`, which differs from `best` in one option, is to be taken."""

        def step(note: str = "", taken: bool = False, **found: float | None) -> TuningStep:
            return TuningStep(choice=choice.name, option=str(option), taken=taken, note=note, **found)

        if time.monotonic() > self._deadline:
            return step("not tried: out of budget")
        try:
            pair = {
                "best": self._runnable(target, precision, best),
                "option": self._runnable(target, precision, candidate),
            }
            quality = {name: self._quality(runnable) for name, runnable in pair.items()}
            timings = alternate(
                pair, data=self.images, batch=self.builder.job.batch_size or 1, rounds=_ROUNDS, runs=_RUNS,
                min_seconds=_SECONDS, timeout=self.builder.job.timeout,
            )  # fmt: skip
            ratio = float(np.median(timings.round_ratios("best", "option")))
            speed = timings.latency("option").p50
        except VitExportError as error:
            return step(f"failed: {error.message}")
        worse = quality["option"] < min(quality["best"] - MAY_LOSE_DB, ENOUGH_DB)
        note = f"loses {quality['best'] - quality['option']:.1f} dB" if worse else ""
        note = note or ("" if ratio > FASTER else "not faster")
        db = quality["option"]
        return step(note, not note, p50_ms=speed, ratio=ratio, sqnr_db=db if np.isfinite(db) else None)

    def _quality(self, runnable: Runnable) -> float:
        """dB against the baseline, infinite for none lost."""
        with Worker(runnable, timeout=self.builder.job.timeout) as worker:
            step = worker.opened.batch or min(8, self.images.count)
            logits = worker.infer(self.images, self.work / "answers.npy", batch=step)
            found = sqnr_db(self.reference, logits)
        return float("inf") if found is None else found

    def _runnable(self, target: Target, precision: Precision, tuned: Tuned) -> Runnable:
        """How the artifact with these options is opened; built once for each set of build options."""
        name = f"{target.name} {precision} {json.dumps(dict(tuned.options), sort_keys=True)}"
        if name not in self._built:
            folder = self.work / f"build-{len(self._built)}"
            folder.mkdir()
            same = dataclasses.replace(tuned, session={})
            builder = dataclasses.replace(self.builder, tuned={(target.name, precision): same})
            self._built[name] = builder.make(target, precision, folder)
        opened = target.runnable(self._built[name], self.builder.job.threads)
        return dataclasses.replace(opened, options={**opened.options, **tuned.session})


def _with(best: Tuned, choice: Choice, option: Any) -> Tuned:
    """`best` with one option changed."""
    if choice.kind == "build":
        return dataclasses.replace(best, options={**best.options, choice.key: option})
    return dataclasses.replace(best, session={**best.session, choice.key: option})
