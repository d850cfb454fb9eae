"""The output folder of a run: one run at a time, scratch that never survives, and a full disk named as such.

OUTPUT/.lock     held by the run at work: its process, since when and where
OUTPUT/.work-*   scratch; renaming from it to OUTPUT is how artifacts appear whole
OUTPUT/.cache    finished stages of a run that did not end well, for the next one (`store`)
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import IO

from vit_export.errors import UsageError, VitExportError

LOCK, CACHE = ".lock", ".cache"
_LEFT_OVER = (".work-*", ".*.part", ".*.old", ".*.tmp")  # what only a killed run leaves
_FULL = (errno.ENOSPC, errno.EDQUOT) if hasattr(errno, "EDQUOT") else (errno.ENOSPC,)
_NO_ROOM = 1 << 20  # bytes; less free space than this counts as none


@contextmanager
def workspace(output: Path) -> Iterator[Path]:
    """Lock `output`, clear what a killed run left there, and yield a scratch folder inside it.

    Raises UsageError if the folder cannot be written, has no room, or another run is at work in it.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = _acquire(output / LOCK)
    except OSError as error:
        raise _unwritable(output, error) from error
    try:
        _clear(output)
        with full_disk_named(output):
            try:
                work = Path(tempfile.mkdtemp(prefix=".work-", dir=output))
            except OSError as error:
                raise _unwritable(output, error) from error
            try:
                yield work
            finally:
                shutil.rmtree(work, ignore_errors=True)
    finally:
        (output / LOCK).unlink(missing_ok=True)
        lock.close()
        if not any(output.iterdir()):  # a run that failed leaves no empty folder behind
            output.rmdir()


@contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """Whatever fails inside for want of space becomes one error that says so.

    Libraries report a full disk in many words (or by a signal), so the free space is looked at, too.
    """
    try:
        yield
    except Exception as error:
        if is_full(folder, error):
            raise UsageError(
                f"no space left in {folder}",
                "free some space and run again: finished artifacts and stages are kept",
            ) from error
        raise


def is_full(folder: Path, error: BaseException) -> bool:
    """Whether `error` comes from a full disk or quota."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, OSError) and chain.errno in _FULL:
            return True
        if isinstance(chain, VitExportError) and any(os.strerror(code) in str(chain) for code in _FULL):
            return True
        chain = chain.__cause__ or chain.__context__
    with suppress(OSError):
        return shutil.disk_usage(folder).free < _NO_ROOM
    return False


def _acquire(path: Path) -> IO[str]:
    """The open lock file. The system releases it when its owner dies, however that happens."""
    while True:
        file = path.open("a+", encoding="utf-8")
        if not _lock(file):
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            raise UsageError(
                f"another run is at work in {path.parent}: {owner}",
                "wait for it or end it, or choose another --output",
            )
        if _still_there(path, file):  # else its owner removed it just before we had it
            break
        file.close()
    file.truncate(0)
    now = datetime.now(timezone.utc)
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {now:%Y-%m-%d %H:%M:%S} UTC\n")
    file.flush()
    return file


def _still_there(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _lock(file: IO[str]) -> bool:
    """Take an exclusive lock without waiting; False if another process has it."""
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(1 << 20)  # beyond the text, which others may then read
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _clear(output: Path) -> None:
    """Remove what a killed run left; nobody else is at work here while we hold the lock."""
    for pattern in _LEFT_OVER:
        for path in [*output.glob(pattern), *output.glob(f"*/*/{pattern}")]:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _unwritable(output: Path, error: OSError) -> UsageError:
    return UsageError(
        f"cannot write {output}: {error.strerror}", "choose a writable --output with free space"
    )
