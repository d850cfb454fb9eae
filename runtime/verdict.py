"""Ship it or hold it, and why, in words.

An artifact is held if it fails, loses more than the limit, agrees too little with the baseline (where
there are no labels), or is not faster than what the same target offers at a higher precision. Every
reason to hold is told, accuracy first. Examples:

    ship   2.4x faster, drop 0.2 points [-0.1, 0.5]
    hold   top-1 drop 2.1 points is over the limit 1.0
    hold   int8 is 0.93x the speed of fp16 here
    hold   int8 is no faster than fp16 here (1.01x; not int8 in the engine: blocks.0.attn.proj)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from vit_export.artifacts import Precision
from vit_export.runtime.accuracy import images_needed
from vit_export.runtime.known_bad import against
from vit_export.runtime.report_schema import Gate, Report, Result

SLOWER = 0.97  # a ratio of medians this close to 1 is a draw on a quiet machine
_NAMED = 4  # layers named in a sentence; the report has them all


@dataclass(frozen=True, slots=True)
class Limits:
    """What an artifact may lose. max_drop: top-1 in percentage points, where there are labels.

    min_agreement: share of images with the baseline's class, where there are none.
    min_cosine: for models without a classifier head and without labels.
    """

    max_drop: float = 1.0
    min_agreement: float = 0.95
    min_cosine: float = 0.98


@dataclass(frozen=True, slots=True)
class Verdict:
    """verdict: None for what was not run. gates: the accuracy limit as it was applied."""

    verdict: Literal["ship", "hold"] | None
    reason: str
    gates: tuple[Gate, ...] = ()


def judge(
    result: Result,
    *,
    peers: Sequence[Result] = (),
    limits: Limits | None = None,
    embeddings: bool = False,
) -> Verdict:
    """Judge one measured result.

    peers: the results of the same run; those of the same target and size at a higher precision are
    what it must beat. embeddings: the model has no classifier head.
    """
    if result.status == "not_run":
        return Verdict(None, f"not run here: {result.reason}")
    if result.status == "failed":
        return Verdict("hold", f"failed: {result.reason}")
    gate = _accuracy_gate(result, limits or Limits(), embeddings)
    if gate is None:
        return Verdict("hold", "accuracy was not measured")
    complaints = [*_accuracy_complaints(result, gate), *_speed_complaints(result, peers)]
    if complaints:
        return Verdict("hold", "; ".join(complaints), (gate,))
    return Verdict("ship", ", ".join([*_speed_words(result), _accuracy_words(result, gate)]), (gate,))


def judged(
    results: Sequence[Result],
    *,
    family: str,
    spec: str,
    limits: Limits | None = None,
    embeddings: bool = False,
) -> Iterator[Result]:
    """Each result of a run with its verdict, and what is known against the runtime it was measured on."""
    models = (family, spec.rpartition(":")[2])
    for result in results:
        verdict = judge(result, peers=results, limits=limits, embeddings=embeddings)
        faults = against(
            result.runtime_version or str(result.details.get("builder", "")),
            models=models,
            precision=result.precision,
            capability=_capability(result),
            slow=_no_gain(result),
        )
        yield msgspec.structs.replace(
            result,
            verdict=verdict.verdict,
            verdict_reason=verdict.reason,
            gates=verdict.gates,
            notes=(*result.notes, *faults),
        )


def _no_gain(result: Result) -> bool:
    """Whether int8 was timed beside fp16 of the same target and won nothing."""
    return result.speedup_vs_fp16 is not None and result.speedup_vs_fp16 < 1 / SLOWER


def _capability(result: Result) -> str:
    """`8.7`: compute capability of the GPU it ran on, "" for what did not run on one."""
    found = (result.details.get("device") or {}).get("capability", ())
    return ".".join(map(str, found))


def exit_code(report: Report, *, max_drop: float | None, require_run: bool) -> int:
    """0 all done; 1 a --max-drop that the user gave is broken; 3 a target failed or was not run.

    max_drop: what the user gave, None when the default limit only informs the verdicts.
    """
    states = {result.status for result in report.results}
    if "failed" in states or (require_run and "not_run" in states):
        return 3
    gates = (gate for result in report.results for gate in result.gates)
    return 1 if max_drop is not None and any(gate.passed is False for gate in gates) else 0


def drop_words(drop: float, interval: tuple[float, float] | None) -> str:
    """`drop 0.2 points [-0.1, 0.5]`."""
    bounds = f" [{interval[0]:.1f}, {interval[1]:.1f}]" if interval else ""
    return f"drop {_zero(drop):.1f} points{bounds}"


def _accuracy_gate(result: Result, limits: Limits, embeddings: bool) -> Gate | None:
    """The one accuracy limit that applies, None if nothing was measured that it could apply to."""
    if result.top1_drop is not None:
        passed = result.top1_drop <= limits.max_drop
        return Gate(rule="max_drop", value=result.top1_drop, limit=limits.max_drop, passed=passed)
    if embeddings and result.cosine is not None:
        passed = result.cosine >= limits.min_cosine
        return Gate(rule="min_cosine", value=result.cosine, limit=limits.min_cosine, passed=passed)
    if result.agreement is not None:
        passed = result.agreement >= limits.min_agreement
        return Gate(rule="min_agreement", value=result.agreement, limit=limits.min_agreement, passed=passed)
    return None


def _accuracy_complaints(result: Result, gate: Gate) -> Iterable[str]:
    if gate.passed:
        return
    if gate.rule == "max_drop":
        yield f"top-1 drop {gate.value:.1f} points is over the limit {_limit(gate)}{_unsettled(result, gate)}"
    elif gate.rule == "min_cosine":
        yield f"cosine {gate.value:.4f} to FP32 is under the limit {gate.limit:g}"
    else:
        yield f"only {gate.value:.1%} of images get FP32's class, the limit is {gate.limit:.1%} (no labels)"


def _speed_complaints(result: Result, peers: Sequence[Result]) -> Iterable[str]:
    """The worst ratio to a higher precision of the same target, or to the baseline if that is worse.

    int8 has to win against fp16: it costs more accuracy, so a draw is no reason to ship it.
    """
    if result.latency_ms is None:
        return
    note = " (unstable timing)" if result.latency_ms.unstable else ""
    order = list(Precision)
    ratios = {
        str(peer.precision): peer.latency_ms.p50 / result.latency_ms.p50
        for peer in peers
        if peer.latency_ms is not None
        and (peer.target, peer.image_size) == (result.target, result.image_size)
        and order.index(peer.precision) < order.index(result.precision)
    }
    if result.speedup is not None:
        ratios["the FP32 baseline"] = result.speedup
    if ratios and min(ratios.values()) < SLOWER:
        rival = min(ratios, key=lambda name: ratios[name])
        note = f"{_fallbacks(result)}{note}"
        yield f"{result.precision} is {ratios[rival]:.2f}x the speed of {rival} here{note}"
    elif result.precision is Precision.INT8 and ratios.get("fp16", 2.0) < 1 / SLOWER:
        yield f"int8 is no faster than fp16 here ({ratios['fp16']:.2f}x{_fallbacks(result, '; ', '')}){note}"


def _fallbacks(result: Result, before: str = " (", after: str = ")") -> str:
    """The quantised layers that the engine does not run in int8, where its inspector was asked."""
    layers = result.details.get("int8_fallbacks")
    if layers is None:
        return ""
    if not layers:
        return f"{before}every quantised layer is int8 in the engine{after}"
    more = f" and {len(layers) - _NAMED} more" if len(layers) > _NAMED else ""
    return f"{before}not int8 in the engine: {', '.join(layers[:_NAMED])}{more}{after}"


def _speed_words(result: Result) -> Iterable[str]:
    if result.speedup is None:  # on a device there is no PyTorch to compare with
        time = f"{result.latency_ms.p50:.1f} ms" if result.latency_ms else ""
        yield time or result.reason or "speed not measured here"
    elif result.speedup >= 1.05:
        yield f"{result.speedup:.1f}x faster"
    else:
        yield "as fast as the FP32 baseline"
    if result.latency_ms is not None and result.latency_ms.unstable:
        yield "unstable timing"


def _accuracy_words(result: Result, gate: Gate) -> str:
    if gate.rule == "max_drop" and result.top1_drop is not None:
        return drop_words(result.top1_drop, result.top1_drop_ci95) + _unsettled(result, gate)
    if gate.rule == "min_cosine":
        return f"cosine {gate.value:.4f} to FP32 (no labels)"
    return f"{gate.value:.1%} of images get FP32's class (no labels)"


def _unsettled(result: Result, gate: Gate) -> str:
    """What would settle it, where the interval lies on both sides of the limit; else nothing."""
    if result.top1_drop is None or result.top1_drop_ci95 is None:
        return ""
    needed = images_needed(result.top1_drop, result.top1_drop_ci95, gate.limit, result.images)
    if needed is None:
        return ""
    return f" (not settled by {result.images} images: about {_rounded(needed)} would)"


def _limit(gate: Gate) -> str:
    """A limit in points with one digit, more only if it has more."""
    return f"{gate.limit:.1f}" if round(gate.limit, 1) == gate.limit else f"{gate.limit:g}"


def _rounded(count: int) -> int:
    """Two significant digits, upwards: an estimate should not look exact."""
    step = int(10 ** max(0, len(str(count)) - 2))
    return -(-count // step) * step


def _zero(value: float) -> float:
    """Without the minus that -0.04 would keep when written with one digit."""
    return 0.0 if abs(value) < 0.05 else value
