"""The search behind `--calib-method auto`: choices in order, each judged by the whole network.

    channel extremes ─▶ rotate? ─▶ equalise? ─▶ divide outliers? ─▶ GPTQ? ─▶ correct biases? ─▶ plan

The order is that of their dependence: each works on the network that the one before it left.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from vit_export.artifacts import (
    Decision,
    Layer,
    Program,
    QuantPlan,
    Range,
    Ranges,
    TargetProfile,
    WeightsOnly,
)
from vit_export.calibration.collect import calibrate, channel_statistics, watch
from vit_export.calibration.correlation import Correlation
from vit_export.calibration.observers import ChannelStats, MinMaxConfig
from vit_export.calibration.plan import plan as make_plan
from vit_export.calibration.preprocess import Batches
from vit_export.export.bias import correct_biases
from vit_export.export.channels import ChannelGroup, find_groups, loose
from vit_export.export.equalize import Equalization, division, equalization, equalize
from vit_export.export.fake_quant import fake_quantized
from vit_export.export.quantize import quantize
from vit_export.export.rotate import Rotated, rotate
from vit_export.export.rounding import round_weights
from vit_export.search.choices import Choices
from vit_export.search.judge import Judge, Score
from vit_export.search.sensitivity import sensitivity, within

_HELD = 16  # images that judge, at most a quarter of all
_HELD_FOR_LIMIT = 64  # where a limit is to be kept: a quarter still, but of finer points
_LAYERS = 8  # of the images that judge, those that each layer is judged by
_WORTH = 0.3  # dB that an operator more must gain
_TRUST = 1.0
"""dB that rotation may seem to lose, for the images that judge are like those that calibrate: it bounds what
new ones can reach. DINOv2-S, calibrated and judged on four photographs, gained 1.3 dB on crops of four others
at another scale and nothing at the same one."""
_ROWS = 256  # tokens that must have reached a layer before its channels are told apart
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
    weights: WeightsOnly | None = None
    sensitivity: bool = False
    seed: int = 0
    embeddings: bool = False
    notify: Notify = lambda *_: None
    decisions: list[Decision] = field(default_factory=list)
    _deadline: float = np.inf
    _found: tuple[Program, tuple[ChannelGroup, ...]] | None = None

    def run(self) -> Found:
        """Decide. Without open choices this is plain calibration and whatever was asked for."""
        start = time.monotonic()
        judged = self.choices.open or self.sensitivity or self.max_drop is not None
        aside = _HELD if self.max_drop is None else _HELD_FOR_LIMIT
        fit, held = split(self.batches, self.seed, aside) if judged else (self.batches, None)
        plain = self._observed(self.program, fit)
        allowed = max(_TIMES * (time.monotonic() - start), _LEAST)
        self._deadline = start + (allowed if self.choices.budget is None else self.choices.budget)
        judge = self._judge(held) if held is not None else None
        best = self._turned(plain, fit, judge)
        best = self._divided(best, judge)
        best = self._rounded(best, fit, judge)
        best = self._corrected(best, fit, judge)
        if held is not None and self._analytic:  # ranges also cover what judged
            stats = _merged(best.stats, self._statistics(best.observed, held))
            best = replace(best, ranges=ranges_after(stats, best.changes, self.batches.count))
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

    def _statistics(self, program: Program, batches: Batches) -> dict[str, ChannelStats]:
        return channel_statistics(
            program, batches, progress=lambda done: self.notify("calibrate", done, batches.count)
        )

    def _observed(self, program: Program, fit: Batches, turned: frozenset[str] = frozenset()) -> _Candidate:
        """A program as it is, with what calibration sees in it."""
        needed = self._analytic or self.choices.alphas != (None,) or self.choices.divide != (False,)
        stats = self._statistics(program, fit) if needed else {}
        return _Candidate(program, program, program, self._ranges(program, (), stats), stats, turned)

    def _judge(self, held: Batches) -> Judge:
        steps = sum(len(one) - 1 for one in self.choices.methods) + len(self.choices.alphas)
        done = iter(range(1, 1000))
        self.notify("search", 0, steps)
        return Judge(
            self.program, held, self.profile, self.embeddings, held.labels,
            seen=lambda: self.notify("search", min(next(done), steps), steps),
        )  # fmt: skip

    def _turned(self, plain: _Candidate, fit: Batches, judge: Judge | None) -> _Candidate:
        """The better of the program as it is and with streams and heads turned, both equalised."""
        turned = Rotated(self.program) if self.choices.rotate == (False,) else rotate(self.program, self.seed)
        if turned.program is self.program:
            return self._equalized(plain, judge)
        rows: dict[str, list[Decision]] = {}

        def equalized(option: str) -> _Candidate:
            start = plain if option == "off" else self._observed(turned.program, fit, turned.norms)
            before = len(self.decisions)
            best = self._equalized(start, judge)
            rows[option], self.decisions[before:] = self.decisions[before:], []
            return best

        options = ["on" if on else "off" for on in self.choices.rotate]
        makers = [(name, partial(equalized, name)) for name in options]
        best = self._best("rotate", makers, judge, margin=-_TRUST)
        taken = "off" if best.observed is self.program else "on"
        for option, decisions in rows.items():
            note = "turned" if option == "on" else ""
            kept = (replace(d, taken=d.taken and option == taken, note=d.note or note) for d in decisions)
            self.decisions += kept
        return best

    def _equalized(self, best: _Candidate, judge: Judge | None) -> _Candidate:
        groups: list[ChannelGroup] = []
        if self.choices.alphas != (None,):
            every = (g for g in self._groups(best.observed) if g.source not in best.turned)
            groups = [g for g in every if _well_seen(g, best.stats)]
        candidates = [
            (f"alpha {alpha:g}" if alpha is not None else "off", self._with_alpha(groups, best, alpha))
            for alpha in self.choices.alphas
        ]
        return self._best("equalize", candidates, judge)

    def _groups(self, program: Program) -> tuple[ChannelGroup, ...]:
        """Its channel groups; finding them takes a forward, and two steps want those of one program."""
        if self._found is None or self._found[0] is not program:
            self._found = program, find_groups(program)
        return self._found[1]

    def _with_alpha(
        self, groups: Sequence[ChannelGroup], best: _Candidate, alpha: float | None
    ) -> Callable[[], _Candidate]:
        def make() -> _Candidate:
            if alpha is None:
                return best
            turned = best.observed is not self.program
            changes = tuple(equalization(best.observed, g, best.stats, alpha, by_head=turned) for g in groups)
            program = equalize(best.observed, changes)
            ranges = self._ranges(program, changes, best.stats)
            return replace(
                best, program=program, unrounded=program, ranges=ranges, changes=changes, score=None
            )

        return make

    def _divided(self, best: _Candidate, judge: Judge | None) -> _Candidate:
        """Outliers that nothing can take are divided by an operator, if that is worth one."""
        if self.choices.divide == (False,):
            return best
        every = loose(best.observed, self._groups(best.observed))
        found = (division(best.observed, g, best.stats) for g in every if _well_seen(g, best.stats))
        divisions = tuple(one for one in found if one is not None)
        if not divisions:
            return best

        def make() -> _Candidate:
            changes = (*best.changes, *divisions)
            program = equalize(best.program, divisions)
            ranges = self._ranges(program, changes, best.stats)
            return replace(
                best, program=program, unrounded=program, ranges=ranges, changes=changes, score=None
            )

        options = [("on" if on else "off", make if on else lambda: best) for on in self.choices.divide]
        return self._best("divide outliers", options, judge, margin=_WORTH)

    def _ranges(
        self, program: Program, changes: Sequence[Equalization], stats: Mapping[str, ChannelStats]
    ) -> Ranges:
        if not self._analytic:
            return calibrate(program, self.batches, self.choices.observer)
        return ranges_after(stats, changes, self.batches.count)

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
            candidate.ranges, candidate.program.layers,
            keep_float=self.keep_float, seed=self.seed, weights=self.weights,
        )  # fmt: skip

    def _best(
        self,
        choice: str,
        options: Sequence[tuple[str, Callable[[], _Candidate]]],
        judge: Judge | None,
        margin: float = 0.0,
    ) -> _Candidate:
        """The option whose network answers most like the float one; a tie keeps the earlier.

        margin: dB that a later option must gain on the first, or may lose.
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
            if best is None or score.sqnr_db > tried[top][1].sqnr_db + (0.0 if top else margin):
                best, top = replace(made, score=score), len(tried)
            tried.append((name, score))
            del made
        for index, (name, score) in enumerate(tried):
            self.decisions.append(Decision(choice, name, index == top, score.sqnr_db, score.agreement))
        assert best is not None
        return best


@dataclass(frozen=True, slots=True, eq=False)
class _Candidate:
    """program: with all changes so far; unrounded: without rounding and bias correction; observed: as `stats`
    (of the images that calibrate) are of, before `changes`. turned: nodes of norms over turned streams.
    """

    program: Program
    unrounded: Program
    observed: Program
    ranges: Ranges
    stats: Mapping[str, ChannelStats]
    turned: frozenset[str] = frozenset()
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
            change = by_layer[name]
            low, high = (change.headroom * end for end in change.applied(name, low, high))
        inputs[name] = Range(float(low.min()), float(high.max()))
    return Ranges(MinMaxConfig.method, images, inputs)


def _well_seen(group: ChannelGroup, stats: Mapping[str, ChannelStats]) -> bool:
    """Whether extremes of single channels mean something: a class token alone says little of each."""
    return all(stats[consumer.layer.name].rows >= _ROWS for consumer in group.consumers)


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
