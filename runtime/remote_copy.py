"""A bundle's files onto a host with rsync, or with sftp where either side has no rsync.

A connection that breaks is taken up again where it stopped: rsync keeps and completes partial files,
`reput` of sftp goes on at the length that arrived. What arrived is hashed there before anything loads it.
"""

from __future__ import annotations

import shlex
import shutil
import signal
import time
from collections.abc import Iterator, Mapping

from vit_export.errors import TargetError
from vit_export.runtime.bundle_manifest import NAME
from vit_export.runtime.bundle_open import Bundle
from vit_export.runtime.remote_ssh import CONNECTION_LOST, Connection, Done

ATTEMPTS = 4
PAUSE_SECONDS = 1.0
# Exit codes for a connection that failed, timed out or ended in the middle of the protocol. sftp that
# writes to a dead ssh is ended by SIGPIPE.
_RSYNC_LOST = (10, 12, 30, 35, CONNECTION_LOST)
_SFTP_LOST = (CONNECTION_LOST, -signal.SIGPIPE if hasattr(signal, "SIGPIPE") else CONNECTION_LOST)


def copy(bundle: Bundle, connection: Connection, folder: str, *, rsync: bool) -> None:
    """Make `folder` there (a plain relative path) hold the bundle's files.

    rsync: whether the host has it. Raises TargetError when the connection breaks ATTEMPTS times, leaving
    what arrived for the next call, or when the host refuses the files (no space, no permission).
    """
    with_rsync = rsync and shutil.which("rsync") is not None
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE_SECONDS * attempt)
        done = _rsync(bundle, connection, folder) if with_rsync else _sftp(bundle, connection, folder)
        if done.code == 0:
            return
        if done.code not in (_RSYNC_LOST if with_rsync else _SFTP_LOST):
            raise TargetError(f"copying the bundle failed: {done.err}")
    raise TargetError(
        f"the connection broke {ATTEMPTS} times while copying the bundle: {done.err}",
        "what arrived is kept there: run the same command again to go on from it",
    )


def _rsync(bundle: Bundle, connection: Connection, folder: str) -> Done:
    ssh = shlex.join(["ssh", *connection.ssh_options])
    flags = ["--recursive", "--times", "--inplace", "--delete", "--exclude=.DS_Store", "--timeout=60"]
    there = f"{connection.host.address}:{folder}/"
    return connection.run(["rsync", *flags, "-e", ssh, "--", f"{bundle.folder.absolute()}/", there])


def _sftp(bundle: Bundle, connection: Connection, folder: str) -> Done:
    """Local names are given relative to the bundle: plain, by its manifest, while its own path may not be."""
    listing = connection.shell(f"cd {folder} && find . -type f -exec wc -c {{}} +")
    if listing.code == CONNECTION_LOST:
        return listing
    batch = "\n".join(_commands(bundle, _sizes(listing.out), folder))
    argv = ["sftp", *connection.ssh_options, "-q", "-b", "-", "--", connection.host.address]
    return connection.run(argv, text=f"{batch}\n".encode(), cwd=bundle.folder)


def _commands(bundle: Bundle, there: Mapping[str, int], folder: str) -> Iterator[str]:
    """The batch of sftp that completes what is there; a line with `-` may fail."""
    files = {file.path: file.bytes for file in bundle.manifest.files}
    files[NAME] = bundle.path(NAME).stat().st_size
    for parent in sorted({part for name in files for part in _parents(name)}):
        yield f"-mkdir {folder}/{parent}"
    for name in sorted(there.keys() - files.keys()):
        yield f"-rm {folder}/{name}"
    for name, size in files.items():
        arrived = there.get(name, 0)
        if arrived != size or size == 0:
            yield f"{'reput' if 0 < arrived < size else 'put'} {name} {folder}/{name}"


def _sizes(listing: bytes) -> Mapping[str, int]:
    """`wc -c` of several files: `  123 ./onnx/model.onnx`; its line of totals has no `./`."""
    found = {}
    for line in listing.decode(errors="replace").splitlines():
        size, _, name = line.strip().partition(" ")
        if size.isdecimal() and name.startswith("./"):
            found[name.removeprefix("./")] = int(size)
    return found


def _parents(name: str) -> Iterator[str]:
    parts = name.split("/")
    yield from ("/".join(parts[:count]) for count in range(1, len(parts)))
