"""`vit-export sweep` and `vit-export worker`: many cells on a Dask cluster."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vit_export.cli_options import export_job
from vit_export.errors import UsageError

if TYPE_CHECKING:
    from vit_export.job import ExportJob
    from vit_export.sweep.cluster import Tls
    from vit_export.sweep.matrix import Cell

_PRECISIONS = ("fp32", "fp16", "int8")
_NOT_FOR_CELLS = (
    "output", "config", "store", "resume", "zip", "quiet", "verbose", "json", "version", "help",
    "tune", "tune-budget", "throughput",  # a cell is measured on whichever machine is free
)  # fmt: skip

TlsFile = Annotated[Path | None, typer.Option(help="PEM file of an encrypted cluster")]


def sweep(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="sweep.toml: a matrix of vit-export's own options")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the cells and how many tasks they make; run nothing")
    ] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="instead of the file's")] = None,
    store: Annotated[
        str | None, typer.Option(help="folder or fsspec URL of finished stages, instead of the file's")
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="tcp://host:8786 of a running Dask cluster; else this machine")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="processes on this machine")] = None,
    route: Annotated[
        list[str] | None, typer.Option(help="TARGET=RESOURCE: where a target runs, as tensorrt=tensorrt-10.3")
    ] = None,
    remeasure: Annotated[
        bool, typer.Option("--remeasure", help="time artifacts again that the store has times of")
    ] = False,
    tls_ca_file: TlsFile = None,
    tls_cert: TlsFile = None,
    tls_key: TlsFile = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="no progress, only the result")] = False,
) -> None:
    """Export and check a matrix of models, sizes, targets and precisions; a rerun does only what changed."""
    from vit_export.runtime.console import make_console
    from vit_export.sweep import matrix
    from vit_export.sweep.cluster import require

    read = matrix.read(file)
    cells = matrix.cells(read, _job_maker(context))
    folder = (output or read.output).absolute()
    place = store or read.store or str(folder / "store")
    if "://" not in place:
        place = str(Path(place).absolute())  # workers have working directories of their own
    console = make_console()
    if dry_run:
        _print_plan(cells, place, folder, console)
        return
    require()
    from vit_export.sweep import run
    from vit_export.terminal import progress_display

    job = run.SweepJob(
        cells,
        folder,
        place,
        scheduler,
        _tls(tls_ca_file, tls_cert, tls_key),
        workers,
        remeasure,
        _routes(route),
    )
    with progress_display(console, quiet) as notify:
        done = run.run(job, shlex.join(["vit-export", *sys.argv[1:]]), notify, console.print)
    _print_sweep(done, console)
    console.print(f"\n{folder}", style="dim")
    raise typer.Exit(run.exit_code(done))


def worker(
    scheduler: Annotated[str, typer.Option(help="address of the Dask scheduler, as tcp://host:8786")],
    resource: Annotated[
        list[str] | None, typer.Option(help="announce this too, as coreml-ane; repeat for several")
    ] = None,
    name: Annotated[str | None, typer.Option(help="of this worker; default its host")] = None,
    probe: Annotated[
        bool, typer.Option("--probe/--no-probe", help="try each SDK, or believe its package metadata")
    ] = True,
    tls_ca_file: TlsFile = None,
    tls_cert: TlsFile = None,
    tls_key: TlsFile = None,
) -> None:
    """Serve a Dask scheduler with what `doctor` finds here: a standard worker, one task at a time."""
    from vit_export.sweep.worker import serve

    serve(scheduler, tuple(resource or ()), name, probe, _tls(tls_ca_file, tls_cert, tls_key), typer.echo)


def _job_maker(context: typer.Context) -> Callable[[Mapping[str, Any]], ExportJob]:
    """Options by their names on the command line to a job; what is not given has its default there."""
    params: list[Any] = list(context.find_root().command.params)
    names = {flag.lstrip("-"): p for p in params for flag in p.opts if flag.startswith("--")}
    defaults = {p.name: p.get_default(context) for p in params}
    lists = {p.name for p in params if getattr(p, "multiple", False)}

    def make(given: Mapping[str, Any]) -> ExportJob:
        values = dict(defaults)
        for name, value in given.items():
            if name not in names or name in _NOT_FOR_CELLS:
                raise UsageError(
                    f"a sweep has no option {name}", "options are those of vit-export without --"
                )
            param = names[name]
            many = param.name in lists and not isinstance(value, list)
            raw = [value] if many else value
            if param.name in lists:
                raw = [str(one) for one in raw]
            values[str(param.name)] = param.process_value(context, _text(raw))
        return export_job(values)

    return make


def _text(value: Any) -> Any:
    """As it would be typed: numbers of TOML as text, so that one parser reads both."""
    return value if isinstance(value, bool | list) else str(value)


def _tls(ca: Path | None, cert: Path | None, key: Path | None) -> Tls:
    from vit_export.sweep.cluster import Tls

    return Tls(ca, cert, key)


def _routes(pairs: list[str] | None) -> dict[str, str]:
    found = dict(pair.partition("=")[::2] for pair in pairs or ())
    if bad := next((target for target, resource in found.items() if not resource), None):
        raise UsageError(f"--route {bad} names no resource", "TARGET=RESOURCE, as tensorrt=tensorrt-10.3")
    return found


def _print_plan(cells: tuple[Cell, ...], store: str, output: Path, console: Any) -> None:
    from vit_export.runtime.console import plain_table
    from vit_export.sweep.run import planned

    for cell in cells:
        console.print(cell.name, soft_wrap=True)
    stages = planned(cells, store)
    body = [(stage, str(count), _seconds(stage, count, output)) for stage, count in stages]
    console.print(plain_table(("stage", "tasks", "estimated"), body, f"\n{len(cells)} cells"))
    console.print("estimated: from the last run in the same output folder, - without one", style="dim")


def _seconds(stage: str, count: int, output: Path) -> str:
    """What tasks of a stage took on average in the last run, times their number."""
    from vit_export.errors import InputError
    from vit_export.runtime.sweep_schema import read as read_sweep

    try:
        last = {work.stage: work for work in read_sweep(output).work}
    except InputError:
        return "-"
    found = last.get(stage)
    return f"{sum(found.each) / len(found.each) * count:.0f} s" if found and found.each else "-"


def _print_sweep(done: Any, console: Any) -> None:
    from vit_export.runtime.console import plain_table
    from vit_export.runtime.sweep_pages import HEADERS, by_device, row, summary

    for device, cells in by_device(done.cells).items():
        console.print(plain_table(HEADERS, (row(cell) for cell in cells), f"\n{device or 'not measured'}"))
    for cell in done.cells:
        if cell.reason:
            console.print(f"{cell.name}: {cell.reason}", soft_wrap=True)
    console.print(f"\n{summary(done)}", soft_wrap=True)
    for work in done.work:
        console.print(f"{work.stage}: {work.made} ran, {work.reused} in the store, {work.failed} failed")
