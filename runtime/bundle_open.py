"""Opening a bundle that came from elsewhere: nothing in it is loaded before every hash was checked.

A zip is unpacked into the work folder, a folder is read where it is. Refused with exit code 2: names that
could leave the folder, links, devices, files that are listed twice or not at all, a wrong size or hash,
archives that are cut short, encrypted, or unfold to more than they should.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from vit_export.artifacts import EvalSet, Labels, Logits, Preprocessing
from vit_export.errors import InputError, UntrustedInput
from vit_export.runtime.bundle_manifest import (
    MAX_FILES,
    MAX_MANIFEST_BYTES,
    MAX_TOTAL_BYTES,
    NAME,
    Manifest,
    StoredFile,
    StoredImages,
    check_name,
    check_unique,
    decode,
)

FOLDER = "bundle"  # its name in an export's output
MAX_RATIO = 200  # unfolded over stored; weights reach about 1.2, dark images about 30
_SMALL = 1 << 20  # below this a ratio means nothing
_CHUNK = 1 << 20
_IGNORED = ".DS_Store"  # macOS leaves one in every folder that was looked at
_BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError)


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle whose every file has the hash its manifest says. sha256: of the manifest."""

    folder: Path
    manifest: Manifest
    sha256: str

    def path(self, name: str) -> Path:
        """Where a file or folder of the manifest is."""
        return self.folder / name

    def images(self, stored: StoredImages, contract: Preprocessing) -> EvalSet:
        """Stored images as every runtime reads them. Raises InputError for another dtype or shape."""
        shape = (stored.images, *contract.size, 3)
        _array(self.path(stored.pixels), np.uint8, shape)
        return EvalSet(
            pixels=self.path(stored.pixels),
            preprocessing=contract,
            count=stored.images,
            labels=self.labels(stored),
            names=tuple(f"{stored.pixels}[{row}]" for row in range(stored.images)),
        )

    def logits(self, stored: StoredImages) -> Logits:
        """The baseline's outputs, float32 [N, K]. Raises InputError unless they are that, and finite."""
        logits: Logits = _array(self.path(stored.logits), np.float32, (stored.images, None))
        if not np.isfinite(logits).all():
            raise InputError(f"{stored.logits} has NaN or Inf", "export the bundle again")
        return logits

    def labels(self, stored: StoredImages) -> Labels | None:
        """Class indices, int64 [N], or None."""
        if stored.labels is None:
            return None
        labels: Labels = _array(self.path(stored.labels), np.int64, (stored.images,))
        return labels


def open_bundle(path: Path, work: Path) -> Bundle:
    """Check a bundle (folder, its manifest.json, .zip, or the output that holds it) and give access to it.

    work: an existing folder; a zip is unpacked into `work/bundle`, which is removed if anything is wrong.
    Raises InputError for what is missing, damaged or no bundle, UntrustedInput for what is hostile.
    """
    path = path.parent if path.name == NAME and path.is_file() else path
    path = path / FOLDER if (path / FOLDER / NAME).is_file() and not (path / NAME).exists() else path
    if path.is_dir():
        try:
            return _open_folder(path)
        except OSError as error:
            raise InputError(f"cannot read {error.filename}: {error.strerror}") from error
    if path.is_file():
        return _open_zip(path, work / "bundle")
    raise InputError(f"no bundle at {path}", "give the folder bundle/ or bundle.zip that vit-export wrote")


def _open_folder(folder: Path) -> Bundle:
    found = dict(_walk(folder))
    if NAME not in found:
        raise InputError(f"{folder} is no bundle: it has no {NAME}", "give the bundle/ that vit-export wrote")
    with (folder / NAME).open("rb") as file:
        data = _manifest_bytes(file, str(folder))
    manifest = decode(data, str(folder))
    listed = _match(manifest, found, str(folder))
    for name, stored in listed.items():
        with (folder / name).open("rb") as file:
            _check_content(stored, file, None, str(folder))
    return Bundle(folder, manifest, hashlib.sha256(data).hexdigest())


def _walk(folder: Path) -> Iterator[tuple[str, int]]:
    """(relative name, bytes) of every file below `folder`; links and devices are refused, not followed."""
    pending, count = [folder], 0
    while pending:
        for entry in os.scandir(pending.pop()):
            name = Path(entry.path).relative_to(folder).as_posix()
            count += 1
            if count > 2 * MAX_FILES:
                raise UntrustedInput(f"{folder} holds more than {MAX_FILES} files")
            if entry.name == _IGNORED:
                continue
            check_name(name, str(folder))
            mode = entry.stat(follow_symlinks=False).st_mode
            if stat.S_ISDIR(mode):
                pending.append(Path(entry.path))
            elif stat.S_ISREG(mode):
                yield name, entry.stat(follow_symlinks=False).st_size
            else:
                raise UntrustedInput(f"{folder} holds {name}, which is a link or a device, not a file")


def _open_zip(path: Path, target: Path) -> Bundle:
    where = str(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = _members(archive, path)
            if NAME not in members:
                raise InputError(f"{where} is no bundle: it has no {NAME}", "zip what is inside bundle/")
            with archive.open(members[NAME]) as file:
                data = _manifest_bytes(file, where)
            manifest = decode(data, where)
            listed = _match(manifest, {name: info.file_size for name, info in members.items()}, where)
            _unpack(archive, members, listed, target, where)
            (target / NAME).write_bytes(data)
    except _BROKEN as error:
        raise InputError(f"{where} is not a complete zip: {error}", "copy it again") from error
    except OSError as error:
        raise InputError(f"cannot unpack {where}: {error.strerror or error}") from error
    return Bundle(target, manifest, hashlib.sha256(data).hexdigest())


def _members(archive: zipfile.ZipFile, path: Path) -> Mapping[str, zipfile.ZipInfo]:
    """Name → entry of every file, after all that can be told without reading any."""
    entries = archive.infolist()
    if len(entries) > 2 * MAX_FILES:
        raise UntrustedInput(f"{path} holds {len(entries)} files, the limit is {MAX_FILES}")
    for entry in entries:
        _check_entry(entry, str(path))
    files = [entry for entry in entries if not entry.is_dir()]
    check_unique([entry.filename for entry in files], str(path))
    if sum(entry.file_size for entry in files) > MAX_TOTAL_BYTES:
        raise UntrustedInput(f"{path} unfolds to more than {MAX_TOTAL_BYTES >> 30} GiB")
    if sum(entry.compress_size for entry in files) > path.stat().st_size:
        raise UntrustedInput(f"{path} has entries that overlap: it unfolds to more than it holds")
    return {entry.filename: entry for entry in files}


def _check_entry(entry: zipfile.ZipInfo, where: str) -> None:
    # `orig_filename`: what is stored, before zipfile cuts at NUL and replaces the separators of Windows.
    check_name(entry.orig_filename.removesuffix("/"), where)
    kind = stat.S_IFMT(entry.external_attr >> 16)
    ordinary = kind in (0, stat.S_IFREG) or (kind == stat.S_IFDIR and entry.is_dir())
    if not ordinary:
        raise UntrustedInput(f"{where} holds {entry.filename}, which is a link or a device, not a file")
    if entry.flag_bits & 0x1:
        raise InputError(f"{where} is encrypted", "unzip it and give the folder")
    if entry.file_size > _SMALL and entry.file_size > MAX_RATIO * max(entry.compress_size, 1):
        raise UntrustedInput(
            f"{where} is a decompression bomb: {entry.filename} unfolds to {entry.file_size} bytes"
        )


def _unpack(
    archive: zipfile.ZipFile,
    members: Mapping[str, zipfile.ZipInfo],
    listed: Mapping[str, StoredFile],
    target: Path,
    where: str,
) -> None:
    """Write every listed file below `target`, hashing as it is written."""
    target.mkdir()
    for name, stored in listed.items():
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        with archive.open(members[name]) as file, place.open("xb") as out:
            _check_content(stored, file, out, where)


def _match(manifest: Manifest, found: Mapping[str, int], where: str) -> Mapping[str, StoredFile]:
    """The listed files by name; they must be those that are there, each of the size it should have."""
    listed = {file.path: file for file in manifest.files}
    for name in found.keys() - listed.keys() - {NAME}:
        raise UntrustedInput(f"{where} holds {name}, which its manifest does not list", "export it again")
    for name, stored in listed.items():
        if name not in found:
            raise InputError(f"{where} lacks {name}", "the copy is incomplete: copy the bundle again")
        if found[name] != stored.bytes:
            raise UntrustedInput(
                f"{where}: {name} has {found[name]} bytes, its manifest says {stored.bytes}",
                "it was cut short or changed: copy the bundle again",
            )
    return listed


def _check_content(stored: StoredFile, file: IO[bytes], out: IO[bytes] | None, where: str) -> None:
    """Hash at most the announced bytes of `file`, copying them to `out`; raise UntrustedInput if wrong."""
    digest, left = hashlib.sha256(), stored.bytes
    while left and (chunk := file.read(min(_CHUNK, left))):
        digest.update(chunk)
        left -= len(chunk)
        if out is not None:
            out.write(chunk)
    if left or file.read(1) or digest.hexdigest() != stored.sha256:
        raise UntrustedInput(
            f"{where}: {stored.path} is not the file its manifest describes (SHA-256 differs)",
            "it was damaged or changed: copy the bundle again",
        )


def _manifest_bytes(file: IO[bytes], where: str) -> bytes:
    data = file.read(MAX_MANIFEST_BYTES + 1)
    if len(data) > MAX_MANIFEST_BYTES:
        raise UntrustedInput(f"{where}: {NAME} is larger than {MAX_MANIFEST_BYTES >> 20} MiB")
    return data


def _array(path: Path, dtype: type[np.generic], shape: tuple[int | None, ...]) -> npt.NDArray[Any]:
    """A memory-mapped .npy of this dtype and shape (None: any length); never a pickle."""
    try:
        array: npt.NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError, TypeError, OverflowError, tokenize.TokenError) as error:
        raise InputError(f"cannot read {path}: {error}", "export the bundle again") from error
    fits = array.ndim == len(shape) and all(
        want in (None, got) for want, got in zip(shape, array.shape, strict=False)
    )
    if array.dtype != dtype or not fits:
        raise InputError(f"{path} holds {array.dtype} {list(array.shape)}, expected {dtype.__name__} {shape}")
    return array
