"""`vit-export verify`: a bundle on this machine, or on others over SSH, with one runtime and no torch."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from vit_export.runtime.report_schema import Report
    from vit_export.runtime.verify import VerifyJob


def verify(
    bundle: Annotated[Path, typer.Argument(help="bundle/ or bundle.zip that an export wrote, or its output")],
    target: Annotated[
        list[str] | None, typer.Option(help="only these of the bundle's targets; repeat for several")
    ] = None,
    threads: Annotated[int, typer.Option(min=0, help="of every runtime; 0: all physical cores")] = 0,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="folder of the report, and of what was built here")
    ] = Path("vit-export-verify"),
    max_drop: Annotated[
        float | None, typer.Option(help="top-1 points an artifact may lose; more gives exit 1")
    ] = None,
    require_run: Annotated[
        bool, typer.Option("--require-run", help="exit 3 when an artifact cannot be run")
    ] = False,
    timeout: Annotated[float, typer.Option(min=1, help="seconds a runtime may take to answer")] = 600,
    host: Annotated[
        list[str] | None, typer.Option(help="ssh://[USER@]HOST[:PORT] to verify on; repeat for several")
    ] = None,
    python: Annotated[
        str, typer.Option(help="interpreter on the hosts that has vit-export; quote a ~")
    ] = "python3",
    keep: Annotated[bool, typer.Option("--keep", help="leave the copied bundle on the hosts")] = False,
    ssh_config: Annotated[
        Path | None, typer.Option(help="OpenSSH configuration instead of ~/.ssh/config", exists=True)
    ] = None,
    host_timeout: Annotated[float, typer.Option(min=1, help="seconds a host may take in all")] = 3600,
    json: Annotated[bool, typer.Option("--json", help="report.json on stdout, the rest on stderr")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="no progress, only the result")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="a line a stage with its time; traceback with errors")
    ] = False,
) -> None:
    """Judge a bundle's artifacts on this machine or, with --host, on others over SSH.

    Needs the base install and the runtime of the artifacts, no PyTorch. Every hash is checked before
    anything is loaded. The report goes to --output, one folder a host if there are several.
    """
    from vit_export.runtime.console import make_console
    from vit_export.runtime.verify import VerifyJob

    job = VerifyJob(tuple(dict.fromkeys(target or ())), threads, max_drop, require_run, timeout)
    console = make_console(stderr=True) if json else make_console()
    shown = quiet or json
    if host:
        from vit_export.runtime.remote_ssh import SshOptions

        options = SshOptions(python=python, keep=keep, config=ssh_config, timeout=host_timeout)
        code = _on_hosts(
            bundle, job, output.absolute(), host, options, console, quiet=shown, verbose=verbose, as_json=json
        )
    else:
        code = _here(bundle, job, output.absolute(), console, quiet=shown, verbose=verbose, as_json=json)
    raise typer.Exit(code)


def _here(
    path: Path, job: VerifyJob, output: Path, console: Console, *, quiet: bool, verbose: bool, as_json: bool
) -> int:
    from vit_export.runtime.bundle_open import open_bundle
    from vit_export.runtime.console import print_device, print_report
    from vit_export.runtime.verify import exit_code, verify, workspace
    from vit_export.terminal import progress_display

    with progress_display(console, quiet, verbose) as notify, workspace(output) as work:
        notify("check hashes", 0, 1)
        report = verify(open_bundle(path, work), job, output, work, _command(), notify)
    print_report(report, console)
    print_device(report, console)
    console.print(f"\nreport     {output / 'report.html'}", style="dim", soft_wrap=True)
    if as_json:
        _print_json(report)
    return exit_code(report, job)


def _on_hosts(
    path: Path,
    job: VerifyJob,
    output: Path,
    names: list[str],
    options: object,
    console: Console,
    *,
    quiet: bool,
    verbose: bool,
    as_json: bool,
) -> int:
    from vit_export.runtime.bundle_open import open_bundle
    from vit_export.runtime.remote import host_table, verify_on_hosts
    from vit_export.runtime.remote_ssh import SshOptions, parse_hosts
    from vit_export.runtime.report_cells import printable, why
    from vit_export.runtime.verify import check_targets, exit_code, workspace
    from vit_export.terminal import progress_display

    assert isinstance(options, SshOptions)
    hosts = parse_hosts(names)
    with progress_display(console, quiet, verbose) as notify, workspace(output) as work:
        notify("check hashes", 0, 1)
        bundle = open_bundle(path, work)
        check_targets(bundle, job)
        outcomes = verify_on_hosts(bundle, hosts, job, options, output, work, notify)
    console.print(host_table(outcomes))
    codes = []
    for outcome in outcomes:
        if outcome.report is None:
            typer.echo(f"error: {outcome.host}: {printable(str(outcome.error))}", err=True)
            codes.append(outcome.error.exit_code if outcome.error else 4)
            continue
        for result in outcome.report.results:
            if result.status != "ok":
                console.print(f"{outcome.host}: {result.name}: {why(result)}", soft_wrap=True)
        if outcome.kept:
            console.print(
                f"{outcome.host}: the bundle is kept in {outcome.kept}", style="dim", soft_wrap=True
            )
        if as_json:
            _print_json(outcome.report)
        codes.append(exit_code(outcome.report, job))
    return max(codes)


def _print_json(report: Report) -> None:
    from vit_export.runtime.report_schema import encode

    sys.stdout.buffer.write(encode(report))
    sys.stdout.buffer.flush()


def _command() -> str:
    return shlex.join(["vit-export", *sys.argv[1:]])
