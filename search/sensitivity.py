"""What each layer costs in int8, and the fewest products that must stay float to keep within a limit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import cache

from vit_export.artifacts import Decision, LayerSensitivity, Program, QuantPlan
from vit_export.search.judge import Judge, Score

WITHIN = "kept within --max-drop"
"""Why a layer that `within` keeps is float."""

Notify = Callable[[str, int, int], None]


def sensitivity(
    judge: Judge, program: Program, plan: QuantPlan, notify: Notify, *, without: bool = True
) -> tuple[LayerSensitivity, ...]:
    """One row a quantised layer: the outputs' SQNR with it alone in int8 and, if asked, with all but it."""
    names = [p.name for p in plan.layers if p.quantized]
    layers = {layer.name: layer for layer in program.layers}
    rows = []
    for done, name in enumerate(names):
        notify("sensitivity", done, len(names))
        alone = judge.score(program, keeping(plan, [n for n in names if n != name]))
        rest = judge.score(program, keeping(plan, [name])).sqnr_db if without else None
        layer = layers[name]
        rows.append(LayerSensitivity(name, layer.kind, layer.macs, _finite(alone.sqnr_db), _finite(rest)))
    return tuple(rows)


def keeping(plan: QuantPlan, names: Collection[str], reason: str = "") -> QuantPlan:
    """The plan with these layers float as well."""
    layers = (
        replace(p, quantized=False, reason=reason) if p.quantized and p.name in names else p
        for p in plan.layers
    )
    return replace(plan, layers=tuple(layers))


def within(
    judge: Judge, program: Program, plan: QuantPlan, rows: Sequence[LayerSensitivity], limit: float
) -> tuple[QuantPlan, tuple[Decision, ...]]:
    """The plan with the shortest row of layers kept float whose loss is at most `limit` points.

    The loudest layers come first, of equally loud ones the cheaper; then what turns out not to be needed
    goes back to int8, the dearest first. Where not even all suffice, all are kept; the report's gate fails.
    """
    order = sorted(rows, key=lambda row: (-_noise(row), row.macs))

    @cache
    def score(kept: tuple[LayerSensitivity, ...]) -> Score:
        return judge.score(program, keeping(plan, [row.layer for row in kept]))

    count = _fewest(lambda n: score(tuple(order[:n])).loss, len(order), limit)
    kept = tuple(order[:count])
    for row in sorted(kept[:-1], key=lambda row: -row.macs):  # the last one was needed
        fewer = tuple(other for other in kept if other is not row)
        if score(kept).loss <= limit and score(fewer).loss <= limit:
            kept = fewer
    return keeping(plan, [r.layer for r in kept], WITHIN), tuple(_decisions(kept, score(()), score(kept)))


def _fewest(loss: Callable[[int], float], most: int, limit: float) -> int:
    """The least count that keeps within the limit: doubled until it does, then bisected."""
    if loss(0) <= limit:
        return 0
    low, high = 0, 1
    while high < most and loss(high) > limit:
        low, high = high, 2 * high
    high = min(high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if loss(middle) <= limit else (middle, high)
    return high


def _decisions(kept: Sequence[LayerSensitivity], before: Score, after: Score) -> Iterator[Decision]:
    for row in kept:
        alone = "" if row.sqnr_alone_db is None else f"alone {row.sqnr_alone_db:.1f} dB, "
        note = f"{alone}{row.macs / 1e6:.1f} M products an image in float"
        yield Decision("keep float", row.layer, taken=True, note=note)
    if kept:
        note = f"loss on images kept aside {before.loss:.2f} to {after.loss:.2f} points"
        option = f"{len(kept)} layers"
        yield Decision("max-drop", option, True, after.sqnr_db, after.agreement, note=note)


def _noise(row: LayerSensitivity) -> float:
    return 0.0 if row.sqnr_alone_db is None else 10 ** (-row.sqnr_alone_db / 10)


def _finite(sqnr: float | None) -> float | None:
    return None if sqnr is None or sqnr == float("inf") else round(sqnr, 3)
