"""report.html: verdicts in words, charts with the tables behind them, and what is needed to do it again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vit_export.runtime import (
    attention_file,
    attention_html,
    calibration_html,
    device_html,
    flips_html,
    sensitivity_html,
)
from vit_export.runtime import html_figures as figures
from vit_export.runtime.flips import Flip, confusion, flips
from vit_export.runtime.html_charts import WITHOUT, available
from vit_export.runtime.html_tree import Child, Node, badge, el, items, page, section, table
from vit_export.runtime.report_cells import (
    HEADERS,
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
from vit_export.runtime.report_schema import Baseline, Gate, Report, Result
from vit_export.runtime.report_sections import sections

MANY = 200  # flipped images listed for one artifact
_STATES = {True: "passed", False: "failed", None: "undecided"}


def render(report: Report, folder: Path | None = None) -> bytes:
    """The report as one HTML file that needs no network, with the pictures that lie in `folder`.

    Raises InputError for a picture or record there that is broken.
    """
    model = report.model
    facts = (
        model.family,
        f"{model.parameters / 1e6:.2f} M parameters",
        f"{model.macs / 1e9:.2f} GMAC" if model.macs else "",
        f"made {report.created:%Y-%m-%d %H:%M %Z}",
    )
    return page(
        f"vit-export: {model.spec}",
        el("header", el("h1", f"vit-export: {model.spec}"), el("p", join(*facts), class_="soft")),
        el("main", *_sections(report, folder)),
    )


def _sections(report: Report, folder: Path | None) -> Iterator[Node | None]:
    cards = el("div", *(_card(result) for result in report.results), class_="cards")
    yield section("Verdicts", el("p", summary(report), class_="lead"), cards if report.results else None)
    without = items(f"{name}: not timed: {reason}" for name, reason in untimed(report))
    yield section("Results", _results(report), without, el("p", LEGEND, class_="soft"))
    yield section("Notes", items(report.model.notes))
    drawn = figures.of_report(report) if available() else []
    yield section(
        "Charts",
        el("div", *drawn, class_="charts") if drawn else None,
        None if available() else el("p", WITHOUT),
    )
    yield section("What each stage cost", _stages(report))
    yield section("Changed predictions", *_changes(report, folder))
    yield section("How int8 was decided", *sensitivity_html.parts(report, folder))
    yield section("Layers kept float", items(_kept(report)))
    yield section("How the artifacts were made", items(_notes(report)))
    if folder is not None:
        yield section("Calibration", *calibration_html.parts(calibration_html.read(folder)))
        seen = attention_file.read(folder)
        yield section("Attention", *attention_html.parts(seen, folder)) if seen else None
    yield section("Images", items(image_facts(report)))
    for one in sections(report):
        yield section(
            one.title,
            table(one.title, one.headers, one.rows),
            el("p", f"{one.caption}.", class_="soft"),
        )
    yield section("Environment", _environment(report))
    yield section("Device", *(device_html.parts(report.device) if report.device else ()))
    yield section("The command", el("pre", report.command))


LEGEND = (
    "p50 and p99: median and 99th percentile of one call. ~: unstable, p90 is over 1.5 times p50. speed: "
    "against the baseline's median. drop: top-1 in percentage points with its 95 % interval, positive is "
    "worse. agree: share of images with the baseline's class. SQNR in dB, inf: no error at all. -: not "
    "measured."
)


def summary(report: Report) -> str:
    """`2 of 6 artifacts can ship: 1 hold, 2 failed, 1 not run.`"""
    states = [status(result) for result in report.results]
    if not states:
        return "No artifact was asked for."
    others = [f"{states.count(s)} {s}" for s in ("hold", "failed", "not run", "-") if s in states]
    tail = f": {', '.join(others)}".replace(" -", " without a verdict") if others else ""
    return f"{states.count('ship')} of {len(states)} artifacts can ship{tail}."


def _card(result: Result) -> Node:
    gates = [
        el("li", f"{gate.rule}: {number(gate.value, 'g')}, limit {gate.limit:g}: ", *_state(gate))
        for gate in result.gates
    ]
    return el(
        "article",
        el("h3", result.name),
        el("p", badge(status(result))),
        el("p", why(result)),
        el("ul", *gates) if gates else None,
        class_="card",
    )


def _state(gate: Gate) -> Iterator[Child]:
    yield badge(_STATES[gate.passed])
    if gate.reason:
        yield f" ({printable(gate.reason)})"


def _results(report: Report) -> Node | None:
    body: list[list[Child]] = []
    for row in rows(report):
        last = row.cells[-1] if row.status == "baseline" else badge(row.status)
        body.append([*row.cells[:-1], last])
    return table("Baseline and artifacts", HEADERS, body)


def _stages(report: Report) -> Node | None:
    body = [
        (
            result.name,
            loss.stage,
            "no error" if loss.sqnr_db is None else f"{loss.sqnr_db:.1f} dB",
            number(shares.get(loss.stage), ".1f"),
            number(loss.agreement, ".3f"),
        )
        for result in report.results
        for shares in (figures.error_shares(result),)
        for loss in result.stages
    ]
    caption = "Each stage against the one before it"
    return table(caption, ("artifact", "stage", "SQNR", "% of error", "agreement"), body)


def _changes(report: Report, folder: Path | None) -> Iterator[Node | None]:
    for result in report.results:
        changed = flips(report, result)
        if changed is None:
            continue
        total = result.predictions.count if result.predictions else 0
        yield el("h3", f"{result.name}: {len(changed)} of {total} images changed class")
        if changed:
            yield el("p", _outcomes(changed))
            yield flips_html.gallery(result, changed, folder) if folder else None
            yield _matrix(result, changed)
            yield _list(result, changed)


def _outcomes(changed: tuple[Flip, ...]) -> str:
    words = [flip.outcome for flip in changed]
    return join(*(f"{words.count(word)} {word}" for word in dict.fromkeys(words))) + "."


def _matrix(result: Result, changed: tuple[Flip, ...]) -> Node | None:
    """Counts of FP32's class against the artifact's, over the classes that changed."""
    counts = confusion(changed)
    classes = sorted({name for pair in counts for name in pair})
    if len(classes) > 20:
        return None  # the list of images says it; a matrix of hundreds says nothing
    body = [[f"FP32 {a}", *(str(counts[a, b] or "·") for b in classes)] for a in classes]
    caption = f"{result.name}: images by FP32 class (row) and new class (column), changed ones only"
    return table(caption, ("class", *map(str, classes)), body)


def _list(result: Result, changed: tuple[Flip, ...]) -> Node | None:
    body = [
        (str(f.image), str(f.before), str(f.after), "-" if f.label is None else str(f.label), f.outcome)
        for f in changed[:MANY]
    ]
    more = f", the first {MANY} of {len(changed)}" if len(changed) > MANY else ""
    caption = f"{result.name}: changed images by index{more}"
    return table(caption, ("image", "FP32 class", "new class", "label", "right answer"), body)


def _kept(report: Report) -> Iterator[str]:
    for result in report.results:
        if result.kept_float:
            yield f"{result.name}: {', '.join(result.kept_float)}"


def _notes(report: Report) -> Iterator[str]:
    """What a user should know of each artifact; what is said of several is said once."""
    named: dict[str, list[str]] = {}
    for result in report.results:
        for note in result.notes:
            named.setdefault(note, []).append(result.name)
    yield from (f"{', '.join(names)}: {note}" for note, names in named.items())


def _environment(report: Report) -> Node | None:
    env = report.environment
    body = [
        ("processor", join(env.cpu, env.machine)),
        ("instructions", join(*env.cpu_features) or "-"),
        ("cores, threads", f"{env.cores}, {env.threads}"),
        ("memory", f"{megabytes(env.memory_bytes)} MB"),
        ("system", env.os),
        ("Python", env.python),
        ("baseline", _runtime(report.baseline)),
        *env.versions.items(),
    ]
    return table("Where it ran", ("what", "value"), body, numbers=False)


def _runtime(baseline: Baseline) -> str:
    return join(f"{baseline.runtime} {baseline.precision}", baseline.runtime_version)
