"""Where calibration and evaluation images come from: a folder, a folder a class, or an .npz.

Nothing is decoded or even read before it is asked for, and never more than one image at a time.
"""

from __future__ import annotations

import hashlib
import os
import struct
import warnings
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from vit_export.artifacts import Labels
from vit_export.errors import InputError

if TYPE_CHECKING:
    from typing_extensions import Self

# Raster formats only: no EPS or WMF, which run other programs.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF")
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".gif", ".webp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".avif"),
)
MAX_PIXELS = 178_956_970  # of one image; Pillow's own limit against decompression bombs

_UNREADABLE = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError,
    RuntimeError, MemoryError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip  # what Pillow's decoders raise on broken files


class BadImage(Exception):
    """One image that cannot be used and why; skipped and counted by whoever reads the source."""


@dataclass(frozen=True, slots=True, eq=False)
class ImageSource(ABC):
    """A list of images, sorted by name, that are decoded one by one.

    names: one an image (path inside the folder, or row number).  labels: class index of each, or None.
    classes: folder names in index order, where sub-folders are classes.
    known: the digest, where somebody has read all images before; it is not computed again.
    """

    path: Path
    names: tuple[str, ...]
    labels: Labels | None = None
    classes: tuple[str, ...] = ()
    known: str = ""

    def __len__(self) -> int:
        return len(self.names)

    @property
    def where(self) -> str:
        """The place as messages and reports call it."""
        return str(self.path)

    @abstractmethod
    def images(self) -> Iterator[Image.Image | BadImage]:
        """One upright RGB image for each name, in order; a BadImage in the place of one that is broken."""

    @abstractmethod
    def contents(self) -> Iterator[bytes]:
        """The stored bytes of each image, in order."""

    @abstractmethod
    def take(self, indices: Sequence[int]) -> Self:
        """The source of these images only, `indices` ascending."""

    def digest(self) -> str:
        """SHA-256 over each name and each image's bytes, in order."""
        if self.known:
            return self.known
        total = hashlib.sha256()
        for name, content in zip(self.names, self.contents(), strict=True):
            total.update(f"{name}\0{len(content)}\0".encode(errors="surrogateescape"))
            total.update(content)
        return total.hexdigest()

    def parts(self, size: int) -> tuple[Self, ...]:
        """Pieces of `size` images, the last with the rest; each known by the digest of the whole."""
        whole = self.digest()
        starts = range(0, len(self), size)
        pieces = (self.take(range(start, min(start + size, len(self)))) for start in starts)
        named = (hashlib.sha256(f"{whole} {start}+{size}".encode()).hexdigest() for start in starts)
        return tuple(replace(piece, known=known) for piece, known in zip(pieces, named, strict=True))

    def sample(self, limit: int | None, seed: int) -> Self:
        """At most `limit` images drawn at random, each class with its share; the same for the same seed."""
        if limit is None or limit >= len(self):
            return self
        return self.take(stratified_sample(self.labels, len(self), limit, seed))


def open_images(
    path: Path | str, *, limit: int | None = None, seed: int = 0, split: str | None = None
) -> ImageSource:
    """The images under `path`: a folder, a folder whose sub-folders are classes, an .npz file, or a URL.

    limit: draw at most this many, by class.  split: take `{split}_images` of an .npz that has them.
    Raises InputError if nothing is there or the file is not what it should be.
    """
    if isinstance(path, str):
        from vit_export.calibration.url_images import UrlSource

        return UrlSource.open_url(path).sample(limit, seed)
    if path.is_dir():
        source: ImageSource = FolderSource.open(path)
    elif path.suffix.lower() == ".npz" and path.is_file():
        from vit_export.calibration.npz import NpzSource

        source = NpzSource.open(path, split)
    elif path.exists():
        raise InputError(f"{path} is not a folder or an .npz file", "give a folder of images, or an .npz")
    else:
        raise InputError(f"no images at {path}", "the path does not exist")
    return source.sample(limit, seed)


@dataclass(frozen=True, slots=True, eq=False)
class FolderSource(ImageSource):
    """Image files in a folder. With no image at its top, each sub-folder is a class, in sorted order."""

    @classmethod
    def open(cls, folder: Path) -> FolderSource:
        """List `folder` and everything below it; hidden files and other kinds of file are passed over."""
        names = sorted(_image_files(folder))
        if not names:
            raise InputError(f"no images in {folder}", f"looked for {' '.join(SUFFIXES)}")
        if any("/" not in name for name in names):
            return cls(folder, tuple(names))
        # An empty folder keeps its index: leaving it out would shift the labels after it.
        classes = tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")))
        labels = [classes.index(name.split("/")[0]) for name in names]
        return cls(folder, tuple(names), np.array(labels, np.int64), classes)

    def images(self) -> Iterator[Image.Image | BadImage]:
        return (_read(self.path / name) for name in self.names)

    def contents(self) -> Iterator[bytes]:
        for name in self.names:
            try:
                yield (self.path / name).read_bytes()
            except OSError:
                yield b""  # counted as a bad image when it is decoded

    def take(self, indices: Sequence[int]) -> Self:
        labels = None if self.labels is None else self.labels[list(indices)]
        return replace(self, names=tuple(self.names[i] for i in indices), labels=labels, known="")


def _read(path: Path) -> Image.Image | BadImage:
    try:
        with path.open("rb") as file:
            return decode(file)
    except BadImage as bad:
        return bad
    except OSError as error:
        return BadImage(str(error.strerror))


def _image_files(folder: Path) -> Iterator[str]:
    """Relative posix paths of the image files below `folder`; links are followed, each folder once."""
    seen: set[str] = set()
    for root, folders, files in os.walk(folder, onerror=_cannot_list, followlinks=True):
        real = os.path.realpath(root)
        folders[:] = [] if real in seen else [name for name in folders if not name.startswith(".")]
        if real in seen:
            continue
        seen.add(real)
        for name in files:
            file = Path(root, name)
            if not name.startswith(".") and file.suffix.lower() in SUFFIXES and file.is_file():
                yield file.relative_to(folder).as_posix()


def _cannot_list(error: OSError) -> None:
    raise InputError(f"cannot list {error.filename}: {error.strerror}")


def decode(file: IO[bytes]) -> Image.Image:
    """The first frame as an upright 8-bit RGB image.

    EXIF rotation is applied; alpha is dropped, as timm and torchvision do; 16-bit grey keeps its high byte.
    Raises BadImage for what Pillow cannot read in full, is not a raster format, or is too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters below is an error; the rest is metadata
            image = Image.open(file, formats=_readable_formats())
            if image.width * image.height > MAX_PIXELS:
                raise BadImage(f"{image.width}x{image.height} pixels are more than {MAX_PIXELS}")
            ImageOps.exif_transpose(image, in_place=True)
            return as_rgb(image)
    except UnidentifiedImageError as error:
        raise BadImage("not an image of a format that is read") from error
    except _UNREADABLE as error:
        raise BadImage(f"{type(error).__name__}: {error}") from error


def as_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode whose range is known as 8-bit RGB; ValueError for 32-bit numbers."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.int64) >> 8  # Pillow's own conversion clips at 255
        return Image.fromarray(values.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"{image.mode}: 32-bit pixels have no fixed range")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _readable_formats() -> list[str]:
    """FORMATS that this build of Pillow has a decoder for."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def stratified_sample(labels: Labels | None, count: int, limit: int, seed: int) -> list[int]:
    """`limit` of `count` indices, ascending, each class in proportion to its size.

    Every image gets its place in a shuffle of its class, divided by the class's size, and the lowest
    places win; ties are broken by the same shuffle.
    """
    if limit < 1:
        raise InputError(f"cannot take {limit} images", "ask for at least one")
    order = np.random.default_rng(seed).permutation(count)
    classes = np.zeros(count, np.int64) if labels is None else labels[order]
    place = np.empty(count, np.float64)
    for value in np.unique(classes):
        members = np.flatnonzero(classes == value)
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    chosen: npt.NDArray[np.int64] = order[np.argsort(place, kind="stable")[:limit]]
    return sorted(int(index) for index in chosen)
