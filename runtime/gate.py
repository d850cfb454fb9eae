"""Green, red or undecided: a report against rules and, for the relative ones, against a baseline report.

Accuracy rules turn red only for a loss that is larger than the limit and real: its paired 95 % interval
lies above zero. They turn green when the whole interval is within the limit. Between the two there are
too few images to decide. Latency rules do not turn red on unstable timings or another machine, nor do
those on speed-ups against a baseline whose runtime failed while it was timed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import msgspec

from vit_export.errors import InputError
from vit_export.runtime.accuracy import images_needed
from vit_export.runtime.gate_metrics import METRICS, Comparison, Reading, Unknown
from vit_export.runtime.gate_rules import Rule, Rules, default_rules
from vit_export.runtime.report_cells import number
from vit_export.runtime.report_markdown import table
from vit_export.runtime.report_schema import Gate, Report, Result
from vit_export.runtime.sweep_schema import Sweep, SweepCell

Outcome = Literal["passed", "failed", "inconclusive", "not_run"]


@dataclass(frozen=True, slots=True)
class Check:
    """One rule on one result. value: None if the result did not run. reason: what a reader needs."""

    result: Result
    rule: Rule
    value: float | None
    outcome: Outcome
    reason: str = ""


@dataclass(frozen=True, slots=True)
class GateOutcome:
    """report: the one judged, with every check among its results' gates (for junit.xml, report.md)."""

    outcome: Literal["passed", "failed", "inconclusive"]
    exit_code: int
    checks: tuple[Check, ...]
    report: Report


def gate(report: Report, baseline: Report | None = None, rules: Rules | None = None) -> GateOutcome:
    """Apply `rules` (default_rules without any) to every result they match.

    A result that failed fails its rules; one that was not run here is listed and decides nothing.
    Raises InputError for a rule that matches nothing, that needs a value the report does not hold, or
    that is relative without a baseline holding the same artifact.
    """
    rules = rules or default_rules(baseline=baseline is not None)
    checks = tuple(check for rule in rules.rule for check in _apply(rule, report, baseline))
    return _outcome(checks, _with_gates(report, checks), rules)


def gate_sweep(sweep: Sweep, baseline: Sweep | None = None, rules: Rules | None = None) -> GateOutcome:
    """`gate` on every report of a sweep, and on the same one of a baseline sweep where it has one.

    In checks and report a target is called `GROUP: TARGET`; rules see it without the group. A cell that
    failed before there was a report fails every rule. Raises InputError for a rule that matches nothing in
    any report, and as `gate` does.
    """
    rules = rules or default_rules(baseline=baseline is not None)
    before = baseline.groups if baseline else {}
    results = [result for report in sweep.groups.values() for result in report.results]
    if lost := next((rule for rule in rules.rule if not any(map(rule.matches, results))), None):
        raise InputError(f"rule {lost.name} matches nothing in {len(sweep.groups)} reports")
    checks = [Check(_lost(cell), rule, None, "failed", cell.reason)
              for cell in sweep.cells if cell.group not in sweep.groups for rule in rules.rule]  # fmt: skip
    judged: list[Result] = []
    for name, report in sweep.groups.items():
        mine = tuple(rule for rule in rules.rule if _applies(rule, report, name in before))
        if not mine:
            continue
        outcome = gate(report, before.get(name), msgspec.structs.replace(rules, rule=mine))
        checks += [replace(check, result=_prefixed(name, check.result)) for check in outcome.checks]
        judged += [_prefixed(name, result) for result in outcome.report.results]
    first = next(iter(sweep.groups.values()))
    return _outcome(tuple(checks), msgspec.structs.replace(first, results=tuple(judged)), rules)


def _applies(rule: Rule, report: Report, compared: bool) -> bool:
    """Rules that compare need the same report in the baseline sweep; one for another target is for others."""
    return any(map(rule.matches, report.results)) and (compared or not METRICS[rule.metric].relative)


def _lost(cell: SweepCell) -> Result:
    """A cell of a report that was never written."""
    return Result(
        target=f"{cell.group}: {cell.target}",
        precision=cell.precision,
        image_size=cell.image_size or (1, 1),
        status="failed",
        reason=cell.reason,
    )


def _prefixed(group: str, result: Result) -> Result:
    return msgspec.structs.replace(result, target=f"{group}: {result.target}")


def _outcome(checks: tuple[Check, ...], judged: Report, rules: Rules) -> GateOutcome:
    outcomes = {check.outcome for check in checks}
    if "failed" in outcomes:
        return GateOutcome("failed", 1, checks, judged)
    if "inconclusive" in outcomes or not outcomes - {"not_run"}:
        return GateOutcome("inconclusive", rules.inconclusive_exit, checks, judged)
    return GateOutcome("passed", 0, checks, judged)


def markdown(outcome: GateOutcome) -> str:
    """A summary for a pull request or $GITHUB_STEP_SUMMARY: the outcome, then one line a check."""
    headers = ("artifact", "rule", "value", "outcome", "why")
    body = (
        (check.result.name, check.rule.name, number(check.value, ".4g"), check.outcome, check.reason)
        for check in outcome.checks
    )
    return "\n".join([f"## vit-export gate: {outcome.outcome}", "", *table(headers, body), ""])


def _apply(rule: Rule, report: Report, baseline: Report | None) -> Iterator[Check]:
    if METRICS[rule.metric].relative and baseline is None:
        raise InputError(f"rule {rule.name} compares with another report", "give it with --baseline")
    matched = [result for result in report.results if rule.matches(result)]
    if not matched:
        selection = f"target={rule.target} precision={rule.precision} image_size={rule.image_size}"
        have = ", ".join(result.name for result in report.results) or "no results"
        raise InputError(f"rule {rule.name} matches nothing ({selection})", f"the report has {have}")
    for result in matched:
        yield from _check(rule, result, report, baseline)


def _check(rule: Rule, result: Result, report: Report, baseline: Report | None) -> Iterator[Check]:
    """The check of one result; none if an optional rule finds no value."""
    if result.status == "not_run":
        yield Check(result, rule, None, "not_run", result.reason)
        return
    if result.status == "failed":
        yield Check(result, rule, None, "failed", result.reason)
        return
    base = next((r for r in baseline.results if r.key == result.key), None) if baseline else None
    reading = METRICS[rule.metric].read(Comparison(report, result, baseline, base))
    if reading is None:
        if rule.required:
            raise InputError(f"rule {rule.name}: {result.name} has no {rule.metric}", _why_absent(rule, base))
        return
    if isinstance(reading, Unknown):
        yield Check(result, rule, None, "inconclusive", reading.reason)
        return
    outcome, reason = _decide(rule, reading, result)
    yield Check(result, rule, reading.value, outcome, reason)


def _decide(rule: Rule, reading: Reading, result: Result) -> tuple[Outcome, str]:
    """See the module's first paragraph."""
    kept = rule.keeps(reading.value)
    if reading.interval is None or rule.max is None:
        if kept or not reading.doubt:
            return ("passed" if kept else "failed"), ""
        return "inconclusive", reading.doubt
    low, high = reading.interval
    bounds = f"95 % interval [{low:.1f}, {high:.1f}]"
    if not kept and low > 0:
        return "failed", bounds
    if high <= rule.limit:
        return "passed", bounds
    needed = images_needed(reading.value, reading.interval, rule.limit, result.images)
    more = f", about {needed} would decide" if needed else ""
    return "inconclusive", f"{bounds}: {result.images} images are too few{more}"


def _why_absent(rule: Rule, base: Result | None) -> str:
    if METRICS[rule.metric].relative and base is None:
        return "the baseline report has no such artifact; set required = false if that is intended"
    return "it was not measured; set required = false if that is intended"


def _with_gates(report: Report, checks: Iterable[Check]) -> Report:
    """The report with the checks as its results' gates, in place of those it had."""
    found: dict[int, list[Gate]] = {}
    for check in checks:
        passed = {"passed": True, "failed": False}.get(check.outcome)
        made = Gate(
            rule=check.rule.name, value=check.value, limit=check.rule.limit, passed=passed,
            reason=check.reason,
        )  # fmt: skip
        found.setdefault(id(check.result), []).append(made)
    results = (msgspec.structs.replace(r, gates=tuple(found.get(id(r), ()))) for r in report.results)
    return msgspec.structs.replace(report, results=tuple(results))
