"""What a gate found, in the forms that GitHub and GitLab show beside a change.

GitHub: workflow commands on stdout (docs.github.com, "Workflow commands"). GitLab: a Code Quality report
(docs.gitlab.com, "Code Quality report format"); its JUnit reader takes junit.xml as it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import msgspec

from vit_export.runtime.gate import Check, GateOutcome, Outcome
from vit_export.runtime.report_cells import number, printable

GITHUB_LEVELS: Mapping[Outcome, str] = {"failed": "error", "inconclusive": "warning", "not_run": "notice"}
GITLAB_SEVERITIES: Mapping[Outcome, str] = {"failed": "critical", "inconclusive": "minor", "not_run": "info"}


def github(outcome: GateOutcome) -> Iterator[str]:
    """One `::error title=...::message` line for each check that did not pass."""
    for check in outcome.checks:
        if check.outcome in GITHUB_LEVELS:
            title = _escape(f"vit-export gate: {check.result.name}", property=True)
            yield f"::{GITHUB_LEVELS[check.outcome]} title={title}::{_escape(_words(check))}"


def gitlab(outcome: GateOutcome, path: str) -> bytes:
    """The checks that did not pass as JSON. path: the file in the repository they are shown at.

    A fingerprint stays the same while the same rule fails on the same artifact, so that GitLab tells
    new findings from old ones.
    """
    found = [
        {
            "description": f"{check.result.name}: {_words(check)}",
            "check_name": f"vit-export/{check.rule.metric}",
            "fingerprint": hashlib.sha256(f"{check.result.name}\0{check.rule.name}".encode()).hexdigest(),
            "severity": GITLAB_SEVERITIES[check.outcome],
            "location": {"path": path, "lines": {"begin": 1}},
        }
        for check in outcome.checks
        if check.outcome in GITLAB_SEVERITIES
    ]
    return msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n"


def _words(check: Check) -> str:
    """`top1_regression <= 1: failed at 2.4 (95 % interval [1.1, 3.9])`."""
    why = f" ({printable(check.reason)})" if check.reason else ""
    return f"{check.rule.name}: {check.outcome.replace('_', ' ')} at {number(check.value, '.4g')}{why}"


def _escape(text: str, *, property: bool = False) -> str:
    """As the runner decodes it; what a report says can neither end the line nor start a command."""
    escaped = text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return escaped.replace(":", "%3A").replace(",", "%2C") if property else escaped
