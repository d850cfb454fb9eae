"""report.md: the table, the verdicts in words, and what is needed to do it again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from vit_export.runtime.report_cells import (
    HEADERS,
    device_facts,
    image_facts,
    join,
    megabytes,
    number,
    printable,
    rows,
    status,
    untimed,
    why,
)
from vit_export.runtime.report_schema import Report
from vit_export.runtime.report_sections import Section, sections
from vit_export.runtime.sweep import CAPTION, TITLE, sweep
from vit_export.runtime.sweep import HEADERS as SWEEP_HEADERS

_ESCAPES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", **{mark: f"\\{mark}" for mark in "\\`*|"}}


def render(report: Report) -> bytes:
    """The report as GitHub-flavoured Markdown, UTF-8."""
    parts = [
        _head(report),
        _sweep(report),
        _notes(report),
        _verdicts(report),
        _data(report),
        *map(_section, sections(report)),
        _environment(report),
        _device(report),
    ]
    texts = ("\n".join(lines) for lines in parts)
    return ("\n\n".join(text for text in texts if text).rstrip() + "\n").encode()


def table(headers: Sequence[str], body: Iterable[Sequence[str]]) -> Iterator[str]:
    """Lines of a Markdown table, cells escaped; all columns but the first are right-aligned."""
    yield _line(headers)
    yield _line([":--", *["--:"] * (len(headers) - 1)])
    yield from (_line([escape(cell) for cell in cells]) for cells in body)


def escape(text: str) -> str:
    """Text that Markdown and HTML show as it is, in one line."""
    safe = "".join(_ESCAPES.get(letter, letter) for letter in printable(text))
    return " ".join(safe.replace("](", "]\\(").split())


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _head(report: Report) -> Iterator[str]:
    model = report.model
    yield f"# vit-export: {escape(model.spec)}"
    yield ""
    yield join(
        f"{escape(model.family)}, {model.parameters / 1e6:.2f} M parameters",
        f"{model.macs / 1e9:.2f} GMAC" if model.macs else "",
        f"made {report.created:%Y-%m-%d %H:%M %Z}",
    )
    yield ""
    yield from table(HEADERS, (row.cells for row in rows(report)))


def _sweep(report: Report) -> Iterator[str]:
    """Accuracy against resolution; nothing for a report of one size."""
    lines = sweep(report)
    if not lines:
        return
    yield f"## {TITLE}"
    yield ""
    yield from table(SWEEP_HEADERS, lines)
    yield ""
    yield f"{CAPTION}."


def _section(section: Section) -> Iterator[str]:
    yield f"## {section.title}"
    yield ""
    yield from table(section.headers, section.rows)
    yield ""
    yield f"{escape(section.caption)}."


def _notes(report: Report) -> Iterator[str]:
    """What was noticed of the model and its images: random weights, too few images, overflow of float16."""
    if report.model.notes:
        yield "## Notes"
        yield ""
        yield from (f"- {escape(note)}" for note in report.model.notes)


def _verdicts(report: Report) -> Iterator[str]:
    yield "## Verdicts"
    yield ""
    yield from (f"- **{escape(name)}**: not timed: {escape(reason)}" for name, reason in untimed(report))
    for result in report.results:
        yield f"- **{escape(result.name)}**: {status(result)}: {escape(why(result))}"
        for gate in result.gates:
            state = {True: "passed", False: "failed", None: "undecided"}[gate.passed]
            value = "-" if gate.value is None else f"{gate.value:g}"
            yield f"  - {escape(gate.rule)}: {value}, limit {gate.limit:g}: {state}{_because(gate.reason)}"
        for loss in result.stages:
            sqnr = "no error" if loss.sqnr_db is None else f"{loss.sqnr_db:.1f} dB"
            yield f"  - stage {escape(loss.stage)}: {sqnr}, agreement {number(loss.agreement, '.3f')}"
        if result.kept_float:
            yield f"  - kept float: {escape(', '.join(result.kept_float))}"
        for note in result.notes:
            yield f"  - {escape(note)}"


def _because(reason: str) -> str:
    return f" ({escape(reason)})" if reason else ""


def _data(report: Report) -> Iterator[str]:
    yield "## Images"
    yield ""
    yield from (f"- {escape(fact)}" for fact in image_facts(report))


def _environment(report: Report) -> Iterator[str]:
    env = report.environment
    yield "## Environment"
    yield ""
    features = " ".join(env.cpu_features)
    yield f"- {join(escape(env.cpu), f'{env.cores} cores', f'{env.threads} threads', features)}"
    yield f"- {join(escape(env.os), f'Python {env.python}', f'{megabytes(env.memory_bytes)} MB of memory')}"
    yield f"- {join(*(f'{name} {version}' for name, version in env.versions.items()))}"
    yield ""
    yield "```"
    yield report.command.replace("```", "'''")
    yield "```"


def _device(report: Report) -> Iterator[str]:
    """Board, clocks, heat and power before and after; nothing for a report of the exporting machine."""
    if report.device is None:
        return
    yield "## Device"
    yield ""
    yield from (f"- {escape(fact)}" for fact in device_facts(report.device))
