"""`verify` on other machines: copy the bundle there, run vit-export there, bring the report back.

A host's report is taken from the output of the command that made it, so it is there whole or not at all.
What the command needs of the host is a POSIX shell and a Python with vit-export and one runtime. The
bundle goes to ~/.cache/vit-export/ID, ID from its hash: a copy that broke is completed by the next call.
"""

from __future__ import annotations

import shlex
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgspec
from rich.table import Table

from vit_export import __version__
from vit_export.errors import InputError, TargetError, VitExportError
from vit_export.runtime import report_files, report_schema
from vit_export.runtime.bundle import subset
from vit_export.runtime.bundle_open import Bundle
from vit_export.runtime.console import plain_table
from vit_export.runtime.doctor import TARGETS
from vit_export.runtime.protocol import ProgressCallback
from vit_export.runtime.remote_copy import copy
from vit_export.runtime.remote_ssh import CONNECTION_LOST, Connection, Done, Host, SshOptions
from vit_export.runtime.report_cells import HEADERS, rows
from vit_export.runtime.report_schema import Report
from vit_export.runtime.verify import VerifyJob

_CACHE = ".cache/vit-export"
_NO_FOLDER, _NO_PYTHON = 91, 93  # exit codes of _PROBE
_COLUMNS = ("artifact", "p50 ms", "p99 ms", "top-1", "drop", "agree", "SQNR", "verdict")
_MAX_HOSTS = 32
# TensorRT comes with JetPack, or from the vendor's own index.
_EXTRAS = {target.name: target.run[0][-1].extra for target in TARGETS if target.name != "tensorrt"}
_CLEAN_SECONDS = 60.0  # also after the host's own time is up

_PROBE = """umask 077
mkdir -p {folder} || exit 91
command -v rsync >/dev/null 2>&1 && echo has-rsync
command -v {python} >/dev/null 2>&1 || exit 93
exec {python} -P -c 'import vit_export; print("vit-export", vit_export.__version__)'
"""

# When the connection ends, so does stdin, and with it what runs: nothing is left to disturb a next run.
_RUN = """exec 3<&0
{command} </dev/null 3<&- & job=$!
( read -r _ <&3; kill "$job" ) >/dev/null 2>&1 & watch=$!
wait "$job"; code=$?
kill "$watch" 2>/dev/null
exit "$code"
"""


@dataclass(frozen=True, slots=True)
class HostOutcome:
    """What one host gave: its report, or why there is none. kept: the folder left there, if any."""

    host: Host
    report: Report | None = None
    error: VitExportError | None = None
    kept: str = ""


def verify_on_hosts(
    bundle: Bundle,
    hosts: Sequence[Host],
    job: VerifyJob,
    options: SshOptions,
    output: Path,
    work: Path,
    progress: ProgressCallback | None = None,
) -> tuple[HostOutcome, ...]:
    """Verify on every host at once and write each report: into `output`, or a folder a host if several.

    A host that fails is an outcome with its error and holds up no other.
    """
    stop = threading.Event()
    done: list[Host] = []

    carried = subset(bundle, job.chosen(bundle.manifest), work / "carried")

    def one(host: Host) -> HostOutcome:
        try:
            found = _on_host(carried, Connection(host, options, work, stop), job)
            report = _named(found, host, bundle)
            report_files.write(report, output if len(hosts) == 1 else output / host.folder)
            return HostOutcome(host, report, kept=f"~/{_folder(carried)}" if options.keep else "")
        except VitExportError as error:
            return HostOutcome(host, error=error)
        finally:
            done.append(host)
            if progress:
                progress("verify on hosts", len(done), len(hosts))

    with ThreadPoolExecutor(min(len(hosts), _MAX_HOSTS)) as pool:
        try:
            return tuple(pool.map(one, hosts))
        finally:
            stop.set()


def host_table(outcomes: Sequence[HostOutcome]) -> Table:
    """One table of all hosts, one line an artifact."""
    return plain_table(("host", *_COLUMNS), _lines(outcomes))


def _lines(outcomes: Sequence[HostOutcome]) -> Iterator[tuple[str, ...]]:
    for outcome in outcomes:
        if outcome.report is None:
            yield (str(outcome.host), *["-"] * (len(_COLUMNS) - 1), "failed")
            continue
        for row in rows(outcome.report):
            if row.status != "baseline":
                yield (str(outcome.host), *(row.cells[HEADERS.index(name)] for name in _COLUMNS))


def _on_host(bundle: Bundle, connection: Connection, job: VerifyJob) -> Report:
    """Probe, copy, run, bring back, clean up. After a copy that broke, what arrived is left there."""
    folder = _folder(bundle)
    rsync = _probe(connection, folder, [artifact.target for artifact in bundle.manifest.artifacts])
    copy(bundle, connection, f"{folder}/bundle", rsync=rsync)
    try:
        return _report(_run(connection, job, folder))
    finally:
        if not connection.options.keep:
            connection.renewed(_CLEAN_SECONDS).shell(f"rm -rf -- {folder}")


def _folder(bundle: Bundle) -> str:
    """Below the user's home there."""
    return f"{_CACHE}/{bundle.sha256[:16]}"


def _probe(connection: Connection, folder: str, targets: Sequence[str]) -> bool:
    """Make the folder and find vit-export; whether the host has rsync. Raises TargetError with the fix.

    targets: of the artifacts, whose runtimes belong to the fix.
    """
    python = _quoted_python(connection.options.python)
    done = connection.shell(_PROBE.format(folder=f"{folder}/bundle", python=python))
    host, shown = connection.host.address, connection.options.python
    if done.code == CONNECTION_LOST:
        raise TargetError(f"cannot connect: {done.err}", f"try it by hand: {_by_hand(connection)} true")
    if done.code == _NO_FOLDER:
        raise TargetError(f"cannot write ~/{_CACHE}: {done.err}")
    if done.code == _NO_PYTHON:
        raise TargetError(
            f"there is no {shown} on {host}",
            "--python PATH names the interpreter to use; quote it ('~/venv/bin/python'), or your own shell "
            "puts this machine's home in the place of ~",
        )
    if done.code or b"vit-export " not in done.out:
        extras = ",".join(dict.fromkeys(_EXTRAS[target] for target in targets if target in _EXTRAS))
        package = f"vit-export[{extras}]" if extras else "vit-export"
        install = f"{shown} -m pip install '{package}=={__version__}'"
        raise TargetError(
            f"{shown} on {host} has no vit-export: {done.err}",
            f"{_by_hand(connection)} {shlex.quote(install)}",
        )
    return b"has-rsync" in done.out


def _run(connection: Connection, job: VerifyJob, folder: str) -> Done:
    """vit-export's own `verify` there, with the report on its stdout."""
    python = _quoted_python(connection.options.python)
    flags = [
        "--output",
        f"{folder}/out",
        "--json",
        "--threads",
        str(job.threads),
        f"--timeout={job.timeout:g}",
    ]
    flags += [part for target in job.targets for part in ("--target", target)]
    flags += [] if job.max_drop is None else [f"--max-drop={job.max_drop:g}"]
    command = f"{python} -P -m vit_export verify {shlex.join([f'{folder}/bundle', *flags])}"
    done = connection.shell(_RUN.format(command=command), hold=True)
    if done.code == CONNECTION_LOST:
        raise TargetError(f"the connection broke while verifying: {done.err}", "run the same command again")
    return done


def _report(done: Done) -> Report:
    """The report from the output of `verify --json`. Raises TargetError if there is none, or half of one."""
    try:
        report = report_schema.decode(done.out)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        if done.code == InputError.exit_code:
            raise InputError(done.err) from error
        raise TargetError(f"it gave no report (exit code {done.code}): {done.err or error}") from error
    if report.device is None:
        raise TargetError("it gave a report that is not of verify")
    return report


def _named(report: Report, host: Host, bundle: Bundle) -> Report:
    """The report as of `host` and of the whole bundle, without paths that are there and not here."""
    assert report.device is not None
    device = msgspec.structs.replace(report.device, host=str(host), bundle_sha256=bundle.sha256)
    results = tuple(msgspec.structs.replace(result, artifact=None) for result in report.results)
    return msgspec.structs.replace(report, device=device, results=results)


def _quoted_python(path: str) -> str:
    """For a shell there; `~/` is that user's home."""
    if path.startswith("~/"):
        return f'"$HOME"/{shlex.quote(path[2:])}'
    return shlex.quote(path if not path.startswith("-") else f"./{path}")


def _by_hand(connection: Connection) -> str:
    """The plain command a user would type to reach the host."""
    port = ["-p", str(connection.host.port)] if connection.host.port else []
    config = ["-F", str(connection.options.config)] if connection.options.config else []
    return shlex.join(["ssh", *config, *port, connection.host.address.replace("[", "").replace("]", "")])
