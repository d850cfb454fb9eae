"""Talking to a host through the system's OpenSSH: its configuration, keys, agent and known hosts.

Nothing is asked for interactively (BatchMode), every process has a deadline and is ended with its
children, and no value of the user's reaches a shell unquoted: hosts are matched against a strict pattern,
remote paths hold plain characters only, everything else is quoted.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from vit_export.errors import TargetError, UsageError

CONNECT_SECONDS = 15
MAX_OUTPUT = 256 << 20  # what a host may print; a report of a million images is a tenth of this
CONNECTION_LOST = 255  # exit code of ssh and sftp when the connection, not the command, failed
_POLL_SECONDS = 0.1

_HOST = re.compile(
    r"ssh://(?:(?P<user>[A-Za-z0-9_][A-Za-z0-9_.-]{0,63})@)?"
    r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]{0,252}|\[[0-9A-Fa-f:.]{2,45}(?:%[A-Za-z0-9]{1,15})?\])"
    r"(?::(?P<port>[0-9]{1,5}))?/?"
)


@dataclass(frozen=True, slots=True)
class Host:
    """A destination. name: DNS name, alias of ssh_config, or address (IPv6 in brackets)."""

    name: str
    user: str = ""
    port: int | None = None

    def __str__(self) -> str:
        return f"{self.user}{'@' if self.user else ''}{self.name}{f':{self.port}' if self.port else ''}"

    @property
    def address(self) -> str:
        """What scp, sftp and rsync call it."""
        return f"{self.user}@{self.name}" if self.user else self.name

    @property
    def folder(self) -> str:
        """A name for a folder of its own."""
        return re.sub(r"[^A-Za-z0-9._@-]+", "-", str(self)).strip("-")


@dataclass(frozen=True, slots=True)
class SshOptions:
    """python: interpreter there. keep: leave the bundle there. config: instead of ~/.ssh/config.

    timeout: seconds for one host in all.
    """

    python: str = "python3"
    keep: bool = False
    config: Path | None = None
    timeout: float = 3600.0


@dataclass(frozen=True, slots=True)
class Done:
    """A process that ended. err: what it said on stderr, in one line."""

    code: int
    out: bytes
    err: str


def parse_hosts(names: Sequence[str]) -> tuple[Host, ...]:
    """Hosts from `ssh://[user@]host[:port]`. Raises UsageError for anything else, or one given twice."""
    hosts = tuple(parse_host(name) for name in names)
    if len(set(hosts)) != len(hosts):
        raise UsageError("a --host is given twice", "each host measures alone; name it once")
    return hosts


def parse_host(text: str) -> Host:
    """One host. Raises UsageError unless every part is plain: no options, spaces or shell characters."""
    found = _HOST.fullmatch(text)
    port = int(found["port"]) if found and found["port"] else None
    if found is None or (port is not None and not 1 <= port <= 65535):
        meant = f"ssh://{text}" if _HOST.fullmatch(f"ssh://{text}") else "ssh://user@device[:port]"
        raise UsageError(f"--host {text!r} is not a host", f"--host {meant}")
    return Host(found["name"], found["user"] or "", port)


class Connection:
    """One host's processes, all under one deadline. stop: set from elsewhere to end what runs."""

    def __init__(self, host: Host, options: SshOptions, work: Path, stop: threading.Event) -> None:
        self.host = host
        self.options = options
        self._work = work
        self._stop = stop
        self._deadline = time.monotonic() + options.timeout

    def renewed(self, seconds: float) -> Connection:
        """The same host with a deadline of its own."""
        return Connection(self.host, replace(self.options, timeout=seconds), self._work, self._stop)

    @property
    def ssh_options(self) -> list[str]:
        """Options that ssh and sftp share. What the user's configuration says elsewhere stands."""
        settings = {
            "BatchMode": "yes",
            "ConnectTimeout": str(CONNECT_SECONDS),
            "ServerAliveInterval": "10",
            "ServerAliveCountMax": "3",
            "ClearAllForwardings": "yes",
            "RemoteCommand": "none",
            "RequestTTY": "no",
            **({"Port": str(self.host.port)} if self.host.port else {}),
        }
        config = ["-F", str(self.options.config)] if self.options.config else []
        return [*config, *(part for key, value in settings.items() for part in ("-o", f"{key}={value}"))]

    def shell(self, script: str, *, hold: bool = False) -> Done:
        """Run a POSIX shell script there. hold: keep its stdin open until it ends or we do."""
        destination = self.host.address.replace("[", "").replace("]", "")
        argv = ["ssh", *self.ssh_options, "--", destination, f"exec sh -c {shlex.quote(script)}"]
        return self.run(argv, hold=hold)

    def run(
        self, argv: Sequence[str], *, text: bytes = b"", hold: bool = False, cwd: Path | None = None
    ) -> Done:
        """Run a local program to its end. text: its stdin.

        Raises TargetError if it is not installed or the host's time is up; its children are ended too.
        """
        if shutil.which(argv[0]) is None:
            raise TargetError(f"{argv[0]} is not installed here", "apt-get install openssh-client")
        with (
            tempfile.TemporaryFile(dir=self._work) as given,
            tempfile.TemporaryFile(dir=self._work) as out,
            tempfile.TemporaryFile(dir=self._work) as err,
        ):
            given.write(text)
            given.seek(0)
            stdin = subprocess.PIPE if hold else given
            process = subprocess.Popen(
                argv, stdin=stdin, stdout=out, stderr=err, cwd=cwd, start_new_session=True
            )
            try:
                self._wait(process, out.fileno())
            finally:
                _end(process)
            out.seek(0)
            err.seek(0)
            return Done(process.returncode, out.read(MAX_OUTPUT), _last_line(err.read(1 << 20)))

    def _wait(self, process: subprocess.Popen[bytes], out: int) -> None:
        while process.poll() is None:
            if self._stop.wait(_POLL_SECONDS):
                raise TargetError("stopped")
            if time.monotonic() > self._deadline:
                raise TargetError(
                    f"it took more than {self.options.timeout:g} s", "give it more: --host-timeout SECONDS"
                )
            if os.fstat(out).st_size > MAX_OUTPUT:
                raise TargetError(f"it printed more than {MAX_OUTPUT >> 20} MiB")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process with its children if it still runs, and close its stdin."""
    if process.poll() is None:
        if sys.platform == "win32":
            process.kill()
        else:
            with suppress(ProcessLookupError):  # it ended by itself just now
                os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        with suppress(OSError):
            process.stdin.close()


def _last_line(text: bytes) -> str:
    lines = [line.strip() for line in text.decode(errors="replace").splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith(("error: ", "internal error: "))]  # its hint follows
    return (ours or lines or [""])[-1].removeprefix("error: ")[:300]
