"""`vit-export gate`: a report against rules and another report, in the forms CI systems read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def gate(
    report: Annotated[Path, typer.Argument(help="report.json or sweep.json, or the folder that holds it")],
    baseline: Annotated[Path | None, typer.Option(help="report to compare with")] = None,
    rules: Annotated[Path | None, typer.Option(help="TOML file of rules")] = None,
    junit: Annotated[Path | None, typer.Option(help="write the checks as JUnit XML")] = None,
    summary: Annotated[
        Path | None,
        typer.Option(envvar="GITHUB_STEP_SUMMARY", help="append the summary in Markdown", show_envvar=True),
    ] = None,
    code_quality: Annotated[
        Path | None, typer.Option(help="write what did not pass as a GitLab Code Quality report")
    ] = None,
    annotations: Annotated[
        bool | None,
        typer.Option(
            "--annotations/--no-annotations",
            help="print GitHub annotations; without the option, where GITHUB_ACTIONS is true",
        ),
    ] = None,
) -> None:
    """Judge a report by rules and against another report; a regression gives exit 1.

    Too few images to decide is `inconclusive`: exit 0, or `inconclusive_exit` of the rules.
    """
    from vit_export.runtime import gate as gates
    from vit_export.runtime import gate_annotations, report_files, report_junit
    from vit_export.runtime.console import make_console, print_gate
    from vit_export.runtime.files import write_atomic
    from vit_export.runtime.gate_rules import read_rules
    from vit_export.runtime.sweep_schema import is_sweep
    from vit_export.runtime.sweep_schema import read as read_sweep

    given = read_rules(rules) if rules else None
    if is_sweep(report):
        outcome = gates.gate_sweep(read_sweep(report), read_sweep(baseline) if baseline else None, given)
    else:
        read = report_files.read
        outcome = gates.gate(read(report), read(baseline) if baseline else None, given)
    print_gate(outcome, make_console())
    if annotations if annotations is not None else os.environ.get("GITHUB_ACTIONS") == "true":
        for line in gate_annotations.github(outcome):
            typer.echo(line)
    if summary is not None:
        _append(summary, gates.markdown(outcome))
    if junit is not None:
        write_atomic(junit, report_junit.render(outcome.report))
    if code_quality is not None:
        write_atomic(code_quality, gate_annotations.gitlab(outcome, str(rules or report)))
    raise typer.Exit(outcome.exit_code)


def _append(path: Path, text: str) -> None:
    from vit_export.errors import UsageError

    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UsageError(f"cannot write --summary {path}: {error.strerror}") from error
