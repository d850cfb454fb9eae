"""The search behind `--calib-method auto`: three choices in order, each judged by the whole network.

    ranges and channel extremes ─▶ equalise? ─▶ round by GPTQ? ─▶ correct biases? ─▶ plan

The order is that of their effect (DINOv2-S, asymmetric: 25.9 dB plain, 28.1 equalised, 28.4 rounded, 28.8
corrected) and of their dependence: each works on the network that the one before it left.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from vit_export.artifacts import (
    Decision,
    Layer,
    Program,
    QuantPlan,
    Range,
    Ranges,
    TargetProfile,
)
from vit_export.calibration.collect import calibrate, channel_statistics, watch
from vit_export.calibration.correlation import Correlation
from vit_export.calibration.observers import ChannelStats, MinMaxConfig
from vit_export.calibration.plan import plan as make_plan
from vit_export.calibration.preprocess import Batches
from vit_export.export.bias import correct_biases
from vit_export.export.channels import ChannelGroup, find_groups
from vit_export.export.equalize import Equalization, equalization, equalize
from vit_export.export.fake_quant import fake_quantized
from vit_export.export.quantize import quantize
from vit_export.export.rounding import round_weights
from vit_export.search.choices import Choices
from vit_export.search.judge import Judge, Score
from vit_export.search.sensitivity import sensitivity, within

HEADROOM = 1.2
"""Of ranges after equalisation. Every channel then reaches the end of the range, so a new image exceeds it
somewhere, and what is clipped is an outlier that matters. DINOv2-S, calibrated on four photographs and judged
on crops of four others, both ways: 25.7 and 25.0 dB without, 26.9 and 28.0 dB with it."""

_HELD = 16  # images that judge, at most a quarter of all
_HELD_FOR_LIMIT = 64  # where a limit is to be kept: a quarter still, but of finer points
_LAYERS = 8  # of the images that judge, those that each layer is judged by
_SECOND = 32  # images that correlations and mean errors are taken from
_TIMES = 3.0  # default budget in plain calibrations
_LEAST = 300.0  # seconds of it: a busy machine must not decide for the models that most people have
_CORRELATIONS = 1 << 30  # bytes of correlation matrices held at once

Notify = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """program: the float program the plan is for, equal in function to the one given; what to quantise."""

    program: Program
    ranges: Ranges
    plan: QuantPlan


@dataclass(slots=True, eq=False)
class Search:
    """One search. batches: the calibration images; profile: what candidates are judged under."""

    program: Program
    batches: Batches
    choices: Choices
    profile: TargetProfile
    keep_float: Sequence[str] = ()
    max_drop: float | None = None
    sensitivity: bool = False
    seed: int = 0
    embeddings: bool = False
    notify: Notify = lambda *_: None
    decisions: list[Decision] = field(default_factory=list)
    _deadline: float = np.inf

    def run(self) -> Found:
        """Decide. Without open choices this is plain calibration and whatever was asked for."""
        start = time.monotonic()
        judged = self.choices.open or self.sensitivity or self.max_drop is not None
        aside = _HELD if self.max_drop is None else _HELD_FOR_LIMIT
        fit, held = split(self.batches, self.seed, aside) if judged else (self.batches, None)
        needed = self._analytic or self.choices.alphas != (None,)
        stats = self._statistics(fit) if needed else {}
        allowed = max(_TIMES * (time.monotonic() - start), _LEAST)
        self._deadline = start + (allowed if self.choices.budget is None else self.choices.budget)
        judge = self._judge(held) if held is not None else None
        best = self._equalized(stats, judge)
        best = self._rounded(best, fit, judge)
        best = self._corrected(best, fit, judge)
        if held is not None and self._analytic:  # ranges also cover what judged
            stats = _merged(stats, self._statistics(held))
            best = replace(best, ranges=self._ranges(best.program, best.changes, stats, self.batches))
        plan = self._plan(best) if judge is None else self._limited(best, judge)
        return Found(best.program, best.ranges, replace(plan, decisions=tuple(self.decisions)))

    def _limited(self, best: _Candidate, judge: Judge) -> QuantPlan:
        """The plan with what must stay float to keep within max_drop, and each layer's sensitivity."""
        plan = self._plan(best)
        over = self.max_drop is not None and judge.score(best.program, plan).loss > self.max_drop
        if not (over or self.sensitivity):
            return plan
        rows = sensitivity(judge.first(_LAYERS), best.program, plan, self.notify, without=self.sensitivity)
        if self.max_drop is not None and over:
            plan, kept = within(judge, best.program, plan, rows, self.max_drop)
            self.decisions += kept
        return replace(plan, sensitivity=rows)

    @property
    def _analytic(self) -> bool:
        """Whether ranges follow from the extremes of channels, without another pass."""
        return isinstance(self.choices.observer, MinMaxConfig)

    def _statistics(self, batches: Batches) -> dict[str, ChannelStats]:
        return channel_statistics(
            self.program, batches, progress=lambda done: self.notify("calibrate", done, batches.count)
        )

    def _judge(self, held: Batches) -> Judge:
        steps = len(self.choices.alphas) + len(self.choices.rounding) + len(self.choices.correct_bias) - 2
        done = iter(range(1, 1000))
        self.notify("search", 0, steps)
        return Judge(
            self.program, held, self.profile, self.embeddings, held.labels,
            seen=lambda: self.notify("search", min(next(done), steps), steps),
        )  # fmt: skip

    def _equalized(self, stats: Mapping[str, ChannelStats], judge: Judge | None) -> _Candidate:
        groups = find_groups(self.program) if self.choices.alphas != (None,) else ()
        candidates = [
            (f"alpha {alpha:g}" if alpha is not None else "off", self._with_alpha(groups, stats, alpha))
            for alpha in self.choices.alphas
        ]
        return self._best("equalize", candidates, judge)

    def _with_alpha(
        self, groups: Sequence[ChannelGroup], stats: Mapping[str, ChannelStats], alpha: float | None
    ) -> Callable[[], _Candidate]:
        def make() -> _Candidate:
            changes = (
                () if alpha is None else tuple(equalization(self.program, g, stats, alpha) for g in groups)
            )
            program = equalize(self.program, changes) if changes else self.program
            return _Candidate(program, program, self._ranges(program, changes, stats, self.batches), changes)

        return make

    def _ranges(
        self,
        program: Program,
        changes: Sequence[Equalization],
        stats: Mapping[str, ChannelStats],
        batches: Batches,
    ) -> Ranges:
        if not self._analytic:
            return calibrate(program, batches, self.choices.observer)
        return ranges_after(stats, changes, batches.count)

    def _rounded(self, best: _Candidate, fit: Batches, judge: Judge | None) -> _Candidate:
        def make() -> _Candidate:
            program = best.program
            for part in _parts(program):
                seen = watch(
                    replace(program, layers=part),
                    fit.take(range(min(_SECOND, fit.count))),
                    lambda layer: Correlation(),
                )[0]
                program = round_weights(program, self._plan(best), seen)
            return replace(best, program=program, score=None)

        options: Mapping[str, Callable[[], _Candidate]] = {"nearest": lambda: best, "gptq": make}
        return self._best("rounding", [(name, options[name]) for name in self.choices.rounding], judge)

    def _corrected(self, best: _Candidate, fit: Batches, judge: Judge | None) -> _Candidate:
        def make() -> _Candidate:
            quantized = fake_quantized(quantize(best.program, self._plan(best), self.profile))
            program = correct_biases(
                best.program, best.unrounded, quantized, fit.take(range(min(_SECOND, fit.count)))
            )
            return replace(best, program=program, score=None)

        options = [("on" if on else "off", make if on else lambda: best) for on in self.choices.correct_bias]
        return self._best("bias correction", options, judge)

    def _plan(self, candidate: _Candidate) -> QuantPlan:
        return make_plan(
            candidate.ranges, candidate.program.layers, keep_float=self.keep_float, seed=self.seed
        )

    def _best(
        self,
        choice: str,
        options: Sequence[tuple[str, Callable[[], _Candidate]]],
        judge: Judge | None,
    ) -> _Candidate:
        """The option whose network answers most like the float one; a tie keeps the earlier.

        Memory: the best network so far and the one being tried.
        """
        if len(options) == 1:
            name, make = options[0]
            if name not in ("off", "nearest"):
                self.decisions.append(Decision(choice, name, taken=True))
            return make()
        assert judge is not None
        tried: list[tuple[str, Score]] = []
        best, top = None, 0
        for name, make in options:
            if tried and time.monotonic() > self._deadline:
                self.decisions.append(Decision(choice, name, taken=False, note="not tried: out of budget"))
                continue
            made = make()
            score = made.score or judge.score(made.program, self._plan(made))
            if best is None or score.sqnr_db > tried[top][1].sqnr_db:
                best, top = replace(made, score=score), len(tried)
            tried.append((name, score))
            del made
        for index, (name, score) in enumerate(tried):
            self.decisions.append(Decision(choice, name, index == top, score.sqnr_db, score.agreement))
        assert best is not None
        return best


@dataclass(frozen=True, slots=True, eq=False)
class _Candidate:
    """program: with all changes so far; unrounded: without rounding and bias correction."""

    program: Program
    unrounded: Program
    ranges: Ranges
    changes: tuple[Equalization, ...] = ()
    score: Score | None = None


def split(batches: Batches, seed: int, most: int = _HELD) -> tuple[Batches, Batches]:
    """(to measure on, to judge by): a seeded quarter of the images, at most `most`, judges."""
    aside = min(most, max(1, batches.count // 4))
    order = np.random.default_rng(seed).permutation(batches.count)
    return batches.take(np.sort(order[aside:]).tolist()), batches.take(np.sort(order[:aside]).tolist())


def ranges_after(stats: Mapping[str, ChannelStats], changes: Sequence[Equalization], images: int) -> Ranges:
    """Min-max ranges of all layer inputs once `changes` are made, from the extremes before them."""
    import torch

    by_layer = {c.layer.name: change for change in changes for c in change.group.consumers}
    inputs = {}
    for name, seen in stats.items():
        low, high = torch.as_tensor(seen.low), torch.as_tensor(seen.high)
        if name in by_layer:
            low, high = (HEADROOM * end for end in by_layer[name].applied(name, low, high))
        inputs[name] = Range(float(low.min()), float(high.max()))
    return Ranges(MinMaxConfig.method, images, inputs)


def _merged(one: Mapping[str, ChannelStats], other: Mapping[str, ChannelStats]) -> dict[str, ChannelStats]:
    for seen in {id(s): (s, other[name]) for name, s in one.items()}.values():
        seen[0].merge(seen[1])
    return dict(one)


def _parts(program: Program) -> Sequence[tuple[Layer, ...]]:
    """Linears in runs whose correlation matrices fit into memory together."""
    parts: list[list[Layer]] = []
    left = 0
    for layer in program.layers:
        if layer.kind != "linear":
            continue
        size = 4 * layer.shape[1] ** 2
        if not parts or size > left:
            parts.append([])
            left = _CORRELATIONS
        parts[-1].append(layer)
        left -= size
    return [tuple(part) for part in parts]
