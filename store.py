"""Finished stages, found again by the hash of everything that decides them.

    ROOT/stages/KEY.json      what the stage was, what went in, and which files came out
    ROOT/blobs/ab/SHA-256     the bytes of those files, each content once

A key is a SHA-256 over the stage's inputs (`stage_keys`), so an entry is either the right one or not there:
nothing is ever invalidated. Files are written under a temporary name and renamed, blobs before the entry
that names them, so a reader meets whole entries only, whoever is killed. Every blob is hashed again when it
is taken out: what was damaged, cut short or edited since counts as absent and is made anew. Two writers of
one key write the same or an equally good result; the last one wins.

ROOT is a folder, or any URL that fsspec opens (`s3://bucket/store`; the `sweep` extra).
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, cast

import msgspec
import numpy as np

from vit_export.errors import MissingExtra, UsageError
from vit_export.python310 import sha256_of

_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Key:
    """Names one result. inputs: what was hashed, by name, so that an entry explains itself."""

    stage: str
    inputs: Mapping[str, str]

    @property
    def digest(self) -> str:
        """SHA-256 over the stage's name and its inputs."""
        content = msgspec.json.encode([self.stage, self.inputs], order="sorted")
        return hashlib.sha256(content).hexdigest()


class StoredFile(msgspec.Struct, frozen=True):
    """One file of an entry. path: relative to its folder, with slashes."""

    path: str
    sha256: str
    bytes: int


class Entry(msgspec.Struct, frozen=True):
    """What a stage gave. note: its result besides the files, as JSON."""

    stage: str
    inputs: dict[str, str]
    files: tuple[StoredFile, ...]
    note: Any = None


class Files(Protocol):
    """Where a store keeps its bytes: a folder or a remote file system."""

    def read(self, name: str) -> bytes | None: ...
    def write(self, name: str, content: bytes) -> None: ...
    def size(self, name: str) -> int | None: ...
    def take(self, name: str, target: Path, *, link: bool) -> None: ...
    def put(self, source: Path, name: str, *, link: bool) -> None: ...
    def remove(self, name: str) -> None: ...


class Store:
    """See the module. `link` in its methods: files are linked, not copied, where the file system can.

    Only for files that nobody edits; a linked blob that was edited fails its hash and is made again.
    read_bytes, written_bytes: of blobs so far, for what a fleet's network must carry.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = str(root)
        self._files: Files = _open(root)
        self.read_bytes = self.written_bytes = 0

    def once(
        self, key: Key, folder: Path, make: Callable[[Path], object], *, link: bool = False
    ) -> tuple[Any, bool]:
        """The stage's note, and whether it was found; its files are in `folder` (which exists) afterwards.

        make: called with `folder` when there is no entry; writes the files and returns the note, which is
        given back as JSON reads it. What `make` raises passes through and nothing is stored.
        """
        found = self.get(key, folder, link=link)
        if found is not None:
            return found.note, True
        return self.put(key, folder, make(folder), link=link).note, False

    def get(self, key: Key, folder: Path, *, link: bool = False) -> Entry | None:
        """Put the entry's files below `folder`; None, with nothing there, if any is missing or damaged."""
        entry = self.entry(key)
        if entry is None:
            return None
        done: list[Path] = []
        for file in entry.files:
            target = folder / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            done.append(target)
            if not self._take(file, target, link=link):
                for path in done:
                    path.unlink(missing_ok=True)
                return None
        return entry

    def entry(self, key: Key) -> Entry | None:
        """The entry without its files; None if there is none that can be read."""
        content = self._files.read(_stage(key))
        if content is None:
            return None
        with suppress(msgspec.DecodeError):  # cut short by a file system that renames in pieces
            return msgspec.json.decode(content, type=Entry)
        return None

    def put(self, key: Key, folder: Path, note: object = None, *, link: bool = False) -> Entry:
        """Keep all files below `folder` as the result of `key`. Raises UsageError if there is no room."""
        try:
            files = tuple(self._put(path, folder, link=link) for path in _files_below(folder))
            entry = Entry(key.stage, dict(key.inputs), files, msgspec.to_builtins(note, enc_hook=plain))
            self._files.write(_stage(key), msgspec.json.encode(entry))
        except OSError as error:
            raise UsageError(
                f"cannot keep a finished stage in {self.root}: {error.strerror or error}",
                "free some space, choose another --store, or --no-resume to keep none",
            ) from error
        return msgspec.json.decode(msgspec.json.encode(entry), type=Entry)

    def _take(self, file: StoredFile, target: Path, *, link: bool) -> bool:
        name = _blob(file.sha256)
        if self._files.size(name) != file.bytes:
            return False
        try:
            self._files.take(name, target, link=link)
        except FileNotFoundError:  # removed between the two calls
            return False
        if sha256_of(target) == file.sha256:
            self.read_bytes += file.bytes
            return True
        self._files.remove(name)
        return False

    def _put(self, path: Path, folder: Path, *, link: bool) -> StoredFile:
        file = StoredFile(path.relative_to(folder).as_posix(), sha256_of(path), path.stat().st_size)
        name = _blob(file.sha256)
        if self._files.size(name) != file.bytes:
            self._files.put(path, name, link=link)
            self.written_bytes += file.bytes
        return file


def plain(value: object) -> object:
    """What notes hold besides JSON's own types: numpy scalars and paths."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return value.as_posix()
    raise TypeError(f"a stage cannot give a {type(value).__name__}")


def _stage(key: Key) -> str:
    return f"stages/{key.digest}.json"


def _blob(digest: str) -> str:
    return f"blobs/{digest[:2]}/{digest}"


def _files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _open(root: str | Path) -> Files:
    if isinstance(root, str) and "://" in root:
        return _RemoteFiles(root)
    return _LocalFiles(Path(root).absolute())


class _LocalFiles:
    """A folder. Everything appears by a rename, so concurrent processes never meet half a file."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def read(self, name: str) -> bytes | None:
        try:
            return (self._root / name).read_bytes()
        except FileNotFoundError:
            return None

    def size(self, name: str) -> int | None:
        try:
            return (self._root / name).stat().st_size
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        self._appear(name, lambda part: cast(object, part.write_bytes(content)))

    def take(self, name: str, target: Path, *, link: bool) -> None:
        _copy(self._root / name, target, link=link)

    def put(self, source: Path, name: str, *, link: bool) -> None:
        self._appear(name, lambda part: _copy(source, part, link=link))

    def remove(self, name: str) -> None:
        (self._root / name).unlink(missing_ok=True)

    def _appear(self, name: str, write: Callable[[Path], object]) -> None:
        path = self._root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.urandom(6).hex()}.part")
        try:
            write(part)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


class _RemoteFiles:
    """A file system of fsspec. An object store writes whole objects; what is not whole fails its hash."""

    def __init__(self, url: str) -> None:
        try:
            import fsspec
        except ImportError as error:
            raise MissingExtra("fsspec", "sweep") from error
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:  # an unknown protocol, or one whose package is missing
            raise UsageError(f"cannot open {url}: {error}") from error

    def read(self, name: str) -> bytes | None:
        try:
            return cast(bytes, self._fs.cat_file(self._path(name)))
        except FileNotFoundError:
            return None

    def size(self, name: str) -> int | None:
        self._fs.invalidate_cache()  # another process may have written since
        try:
            return cast(int, self._fs.size(self._path(name)))
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        self._parents(name)
        self._fs.pipe_file(self._path(name), content)

    def take(self, name: str, target: Path, *, link: bool) -> None:
        self._fs.get_file(self._path(name), str(target))

    def put(self, source: Path, name: str, *, link: bool) -> None:
        self._parents(name)
        self._fs.put_file(str(source), self._path(name))

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    def _parents(self, name: str) -> None:
        self._fs.makedirs(self._path(name).rpartition("/")[0], exist_ok=True)

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"


def _copy(source: Path, target: Path, *, link: bool) -> None:
    if link:
        with suppress(OSError):  # another file system, or one without links: copy
            os.link(source, target)
            return
    with source.open("rb") as read, target.open("wb") as write:
        shutil.copyfileobj(cast(IO[bytes], read), write, _CHUNK)
