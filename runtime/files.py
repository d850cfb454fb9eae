"""Files that are complete or absent: write beside the target under a temporary name, then rename.

A rename within one directory is atomic on POSIX and on Windows, so a reader, a killed process or a full
disk never meets half a report. Everything the runtime package writes goes through here, and what a user gives
it to read.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vit_export.errors import InputError, UsageError


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path`, replacing what was there only once all of it is on disk.

    Missing parent folders are made. Raises UsageError if the place cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        part = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            part.chmod(0o666 & ~_umask())  # mkstemp makes 0600, a report is an ordinary file
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error


def read_bounded(path: Path, most: int, what: str) -> bytes:
    """The content of a file that a user named. most: bytes it may have; what: it should be, for messages.

    Raises InputError for what is no file, is larger or cannot be read.
    """
    try:
        if path.exists() and not path.is_file():  # a device or a pipe may never end
            raise InputError(f"{path} is not a file")
        if path.stat().st_size > most:
            raise InputError(f"{path} is too large for a {what}: {path.stat().st_size} bytes")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the {what} {path}: {error.strerror or error}") from error


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield an empty directory that becomes `path` when the block ends well, and vanishes otherwise.

    A directory already at `path` is replaced, and only after the new one is complete.
    Raises UsageError if the place cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
        part.chmod(0o777 & ~_umask())
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        yield part
        _swap(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def size_bytes(path: Path) -> int:
    """Bytes of a file, or of all files under a directory (an .mlpackage, an OpenVINO folder)."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size


def _swap(part: Path, path: Path) -> None:
    """Put `part` at `path`; a directory there before is moved aside first, because rename needs it gone."""
    try:
        if not path.exists():
            part.rename(path)
            return
        old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
        try:
            path.rename(old / path.name)
            part.rename(path)
        finally:
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise _unwritable(path, error) from error


def _umask() -> int:
    """The process's umask; the only way to read it is to set it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _unwritable(path: Path, error: OSError) -> UsageError:
    return UsageError(
        f"cannot write {path}: {error.strerror or error}", "choose a writable --output with free space"
    )
