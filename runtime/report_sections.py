"""Tables about speed and cost that the terminal, Markdown and HTML show alike, each absent without data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from vit_export.runtime.report_cells import NONE, megabytes, milliseconds, number, shown_size
from vit_export.runtime.report_schema import Report, Roofline


@dataclass(frozen=True, slots=True)
class Section:
    """A titled table with a sentence about it. brief: the terminal shows the table, not only the sentence."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str
    brief: bool = True


def sections(report: Report) -> Iterator[Section]:
    """Those of SECTIONS that the report has data for."""
    for make in SECTIONS:
        section = make(report)
        if section.rows:
            yield section


def _names(report: Report) -> Callable[[str], str]:
    """Shortens names of artifacts by the image size that all of them have."""
    sizes = {baseline.image_size for baseline in (report.baseline, *report.more_baselines)}
    sizes |= {result.image_size for result in report.results}
    same = f" {shown_size(sizes.pop())}" if len(sizes) == 1 else ""
    return lambda name: name.removesuffix(same)


def roofline(report: Report) -> Section:
    """How much of the processor each artifact uses."""
    short = _names(report)
    named = [
        (short(baseline.name), baseline.roofline) for baseline in (report.baseline, *report.more_baselines)
    ]
    named += [(short(result.name), result.roofline) for result in report.results]
    rows = tuple((name, *_reached(found)) for name, found in named if found is not None)
    return Section("Share of the processor", ("artifact", "GMAC/s", "share", "of"), rows, _ceilings(report))


def tuning(report: Report) -> Section:
    """What --tune tried on this machine."""
    short = _names(report)
    rows = tuple(
        (
            short(result.name),
            f"{step.choice}: {step.option}",
            milliseconds(step.p50_ms),
            NONE if step.ratio is None else f"{step.ratio:.2f}x",
            number(step.sqnr_db, ".1f"),
            "yes" if step.taken else f"no, {step.note}",
        )
        for result in report.results
        for step in result.tuning
    )
    caption = "each option beside the best before it, in alternating rounds; faster: ratio of their medians"
    return Section(
        "Tuned on this machine", ("artifact", "option", "ms", "faster", "SQNR", "taken"), rows, caption
    )


def throughput(report: Report) -> Section:
    """Images a second by batch, a row for each way of running an artifact."""
    short = _names(report)
    found = [(short(result.name), point) for result in report.results for point in result.throughput]
    batches = sorted({point.batch for _, point in found})
    ways: dict[tuple[str, str, str], dict[int, float]] = {}
    for name, point in found:
        at_once = f"{point.streams} at once" if point.mode == "throughput" else "one by one"
        ways.setdefault((name, at_once, str(point.threads)), {})[point.batch] = point.images_per_s
    rows = tuple(
        (*way, *(f"{speeds[batch]:.1f}" if batch in speeds else NONE for batch in batches))
        for way, speeds in ways.items()
    )
    headers = ("artifact", "calls", "threads", *map(str, batches))
    caption = "calls: one by one as behind a camera, at once as in a server"
    return Section("Images a second by batch", headers, rows, caption)


def costs(report: Report) -> Section:
    """Where the run's own time and memory went."""
    rows = tuple((c.stage, f"{c.seconds:.1f}", megabytes(c.peak_rss_bytes)) for c in report.costs)
    return Section("What this run took", ("stage", "s", "peak MB"), rows, total(report), brief=False)


def total(report: Report) -> str:
    """`took 81 s and at most 1230 MB (calibrate)`; empty for a report without costs."""
    if not report.costs:
        return ""
    seconds = sum(cost.seconds for cost in report.costs)
    most = max(report.costs, key=lambda cost: cost.peak_rss_bytes or 0)
    memory = f" and at most {megabytes(most.peak_rss_bytes)} MB ({most.stage})" if most.peak_rss_bytes else ""
    return f"took {seconds:.0f} s{memory}"


def _reached(found: Roofline) -> tuple[str, str, str]:
    share = NONE if found.share is None else f"{found.share:.0%}"
    return f"{found.gmac_per_s:.0f}", share, found.ceiling


def _ceilings(report: Report) -> str:
    found = report.ceilings
    if found is None:
        known = (result.roofline for result in report.results if result.roofline is not None)
        if any(one.share is not None for one in known):
            return "timed on several machines: a share is of what the row's own reaches in large products"
        return "no ceiling was measured: that takes OpenVINO or PyTorch"
    tops = ((name, getattr(found, name)) for name in ("fp32", "bf16", "int8"))
    reached = ", ".join(f"{name} {top:.0f}" for name, top in tops if top)
    return f"large products reach, in GMAC/s with {found.threads} threads: {reached} ({found.runtime})"


SECTIONS: tuple[Callable[[Report], Section], ...] = (roofline, tuning, throughput, costs)
