"""A real OpenSSH server on 127.0.0.1 with throw-away keys, and a proxy that cuts connections."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

SSHD = Path("/usr/sbin/sshd")
INSTALL = "apt-get update && apt-get install -y openssh-server openssh-client rsync"
TOOLS = ("sh", "mkdir", "rm", "find", "wc", "cat", "sleep", "uname", "dirname")


@dataclass(frozen=True)
class Server:
    """A running server. home: where its sessions start. config: for the client, with its keys."""

    port: int
    home: Path
    config: Path

    @property
    def url(self) -> str:
        return f"ssh://127.0.0.1:{self.port}"

    @property
    def left(self) -> list[str]:
        """What verify left in the home's cache."""
        cache = self.home / ".cache" / "vit-export"
        return sorted(p.name for p in cache.iterdir()) if cache.exists() else []


@contextmanager
def start(folder: Path, *, rsync: bool = True) -> Iterator[Server]:
    """A server whose sessions have `folder/home` as home. rsync: whether it is found there.

    Fails, with the command that installs it, where there is no sshd: the claims need a real one.
    """
    assert SSHD.exists() and shutil.which("ssh"), f"these tests need a real sshd: {INSTALL}"
    assert shutil.which("rsync"), f"these tests need rsync: {INSTALL}"
    home, keys = folder / "home", folder / "keys"
    for place in (home, keys):
        place.mkdir(parents=True)
    for name in ("host", "user"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / name)]
        subprocess.run(command, check=True)
    port = free_port()
    (folder / "sshd_config").write_text(_server_config(port, home, keys, _path(folder, rsync)))
    config = folder / "ssh_config"
    config.write_text(_client_config(keys, folder / "known_hosts"))
    host_key = (keys / "host.pub").read_text().split()[:2]
    (folder / "known_hosts").write_text(f"* {' '.join(host_key)}\n")
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd's own requirement when started by root
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [SSHD, "-D", "-e", "-f", folder / "sshd_config"], stdin=subprocess.DEVNULL, stderr=log
        )
    try:
        _wait_for(port, folder / "log")
        yield Server(port, home, config)
    finally:
        process.terminate()
        process.wait(10)


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _path(folder: Path, rsync: bool) -> str:
    """PATH of the sessions: the system's, or a folder with just enough and no rsync."""
    if rsync:
        return "/usr/bin:/bin"
    tools = folder / "bin"
    tools.mkdir()
    for name in TOOLS:
        (tools / name).symlink_to(str(shutil.which(name, path="/usr/bin:/bin")))
    return str(tools)


def _server_config(port: int, home: Path, keys: Path, path: str) -> str:
    """Sessions start in `home` instead of the account's own, so that tests touch nobody's files."""
    sftp = "/usr/lib/openssh/sftp-server"
    return f"""Port {port}
ListenAddress 127.0.0.1
HostKey {keys}/host
AuthorizedKeysFile {keys}/user.pub
StrictModes no
UsePAM no
PasswordAuthentication no
PidFile none
MaxStartups 100
Subsystem sftp {sftp}
SetEnv HOME={home} PATH={path}
ForceCommand cd {home} && export HOME={home} PATH={path} && exec sh -c "$SSH_ORIGINAL_COMMAND"
"""


def _client_config(keys: Path, known_hosts: Path) -> str:
    return f"""Host *
  IdentityFile {keys}/user
  IdentitiesOnly yes
  UserKnownHostsFile {known_hosts}
  StrictHostKeyChecking yes
"""


def _wait_for(port: int, log: Path) -> None:
    for _ in range(200):
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise AssertionError(f"sshd did not start: {log.read_text()}")


@dataclass
class CuttingProxy:
    """Forwards to `port`; connection number i is cut after limits[i] bytes of the client's (None: never).

    sent: bytes each connection carried from the client.
    """

    port: int
    limits: Sequence[int | None]
    sent: list[int] = field(default_factory=list)
    listener: socket.socket = field(default_factory=socket.socket)

    def __enter__(self) -> CuttingProxy:
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.close()

    @property
    def url(self) -> str:
        return f"ssh://127.0.0.1:{self.listener.getsockname()[1]}"

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                number = len(self.sent)
                self.sent.append(0)
                threading.Thread(target=self._forward, args=(number, client), daemon=True).start()

    def _forward(self, number: int, client: socket.socket) -> None:
        server = socket.create_connection(("127.0.0.1", self.port))
        limit = self.limits[number] if number < len(self.limits) else None
        threading.Thread(target=_pump, args=(server, client), daemon=True).start()
        with suppress(OSError):
            while data := client.recv(16384):
                server.sendall(data)
                self.sent[number] += len(data)
                if limit is not None and self.sent[number] >= limit:
                    break
        with suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)
        client.close()
        with suppress(OSError):
            server.shutdown(socket.SHUT_WR)  # what was sent before the cut still arrives


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)


def running(home: Path) -> list[str]:
    """Command lines of processes that work below `home` now."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            line = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if (place / "cwd").readlink().is_relative_to(home) and "sshd" not in line:
                found.append(line)
    return found
