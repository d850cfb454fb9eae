"""Images from one .npz, read row by row: an archive larger than memory streams like a folder does."""

from __future__ import annotations

import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.lib import format as npy
from PIL import Image

from vit_export.artifacts import Labels
from vit_export.calibration.images import MAX_PIXELS, BadImage, ImageSource
from vit_export.errors import InputError

if TYPE_CHECKING:
    from typing_extensions import Self

MAX_IMAGES = 5_000_000  # each has a name in memory
# What zipfile and numpy's header reader, which tokenizes Python, raise on broken or encrypted files.
_BROKEN = (
    zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, NotImplementedError, RuntimeError,
    TypeError, KeyError, OverflowError, MemoryError, struct.error, tokenize.TokenError,
)  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class NpzSource(ImageSource):
    """Rows of a uint8 [N, H, W, 3] array in an .npz.

    member: its name in the archive.  shape: (H, W, 3).  rows: which rows, ascending.
    """

    member: str = "images.npy"
    shape: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()

    @classmethod
    def open(cls, path: Path, split: str | None) -> NpzSource:
        """Read the header of `{split}_images` (or `images`) and the labels beside it; no pickles.

        Raises InputError for a missing key, another dtype or layout, or labels of another length.
        """
        try:
            with zipfile.ZipFile(path) as archive:
                key = _images_key(path, archive.namelist(), split)
                with archive.open(f"{key}.npy") as member:
                    count, *shape = _header(path, key, member)
                    if archive.getinfo(member.name).file_size != member.tell() + count * math.prod(shape):
                        raise EOFError(f"{key} is cut short")
                labels = _labels(path, archive, key.replace("images", "labels"), count)
        except _BROKEN as error:
            raise InputError(
                f"{path} is not a readable .npz: {error}", "write it with numpy.savez"
            ) from error
        names = tuple(f"{key}[{row}]" for row in range(count))
        return cls(path, names, labels, (), "", f"{key}.npy", tuple(shape), tuple(range(count)))

    def images(self) -> Iterator[Image.Image | BadImage]:
        for content in self.contents():
            yield Image.fromarray(np.frombuffer(content, np.uint8).reshape(self.shape))

    def contents(self) -> Iterator[bytes]:
        size = math.prod(self.shape)
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as member:
                _read_header(member)
                start = member.tell()
                for row in self.rows:
                    member.seek(start + row * size)
                    content = member.read(size)
                    if len(content) < size:
                        raise EOFError(f"row {row} is cut short")
                    yield content
        except _BROKEN as error:
            raise InputError(f"{self.path} is broken at {self.member}: {error}", "copy it again") from error

    def take(self, indices: Sequence[int]) -> Self:
        return replace(
            self,
            names=tuple(self.names[i] for i in indices),
            labels=None if self.labels is None else self.labels[list(indices)],
            rows=tuple(self.rows[i] for i in indices),
            known="",
        )


def _images_key(path: Path, members: Sequence[str], split: str | None) -> str:
    """`{split}_images` where the archive has it, else `images`."""
    keys = [member.removesuffix(".npy") for member in members]
    for key in (f"{split}_images", "images"):
        if key in keys:
            return key
    raise InputError(
        f"{path} has no array named images, only {', '.join(keys) or 'nothing'}",
        "save it with numpy.savez(path, images=uint8 [N, H, W, 3], labels=...)",
    )


def _header(path: Path, key: str, member: IO[bytes]) -> tuple[int, ...]:
    """The array's shape after checking that it is a C-ordered uint8 [N, H, W, 3]."""
    shape, fortran, dtype = _read_header(member)
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran or 0 in shape:
        raise InputError(
            f"{path}: {key} is {dtype} {list(shape)}{' in Fortran order' if fortran else ''}",
            "it must be uint8 [N, H, W, 3], RGB, in C order, with at least one image",
        )
    if shape[0] > MAX_IMAGES:
        raise InputError(f"{path}: {key} announces {shape[0]} images, the limit is {MAX_IMAGES}")
    if shape[1] * shape[2] > MAX_PIXELS:
        raise InputError(f"{path}: images of {shape[2]}x{shape[1]} pixels are more than {MAX_PIXELS}", "")
    return tuple(shape)


def _read_header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """(shape, Fortran order, dtype); leaves the file at the first byte of data."""
    version = npy.read_magic(member)
    return (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(member)


def _labels(path: Path, archive: zipfile.ZipFile, key: str, count: int) -> Labels | None:
    """int64 [N], or None where the archive has none."""
    if f"{key}.npy" not in archive.namelist():
        return None
    with archive.open(f"{key}.npy") as member:
        shape, _, dtype = _read_header(member)
        if shape != (count,) or dtype.kind not in "iu":
            raise InputError(
                f"{path}: {key} is {dtype} {list(shape)} for {count} images",
                "labels are class indices, integers [N]",
            )
        return np.frombuffer(member.read(count * dtype.itemsize), dtype, count).astype(np.int64)
