"""Images behind a URL that fsspec opens (`s3://bucket/photos`), streamed: one is in memory at a time."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from vit_export.calibration.images import SUFFIXES, BadImage, FolderSource, decode
from vit_export.errors import InputError, MissingExtra

MAX_BYTES = 1 << 30  # of one stored image; a file that says it is larger is no image


@dataclass(frozen=True, slots=True, eq=False)
class UrlSource(FolderSource):
    """Image files below a URL; sub-folders are classes as in a local folder. url: as the user gave it."""

    url: str = ""

    @classmethod
    def open_url(cls, url: str) -> UrlSource:
        """List everything below `url`.

        Raises MissingExtra without fsspec, InputError for a place that cannot be opened or has no image.
        """
        files, root = _file_system(url)
        try:
            found = [PurePosixPath(path).relative_to(root).as_posix() for path in files.find(root)]
        except (OSError, ValueError) as error:
            raise InputError(f"cannot list {url}: {error}") from error
        names = sorted(name for name in found if _is_image(name))
        if not names:
            raise InputError(f"no images at {url}", f"looked for {' '.join(SUFFIXES)}")
        if any("/" not in name for name in names):
            return cls(Path(url), tuple(names), url=url)
        classes = tuple(sorted({name.split("/")[0] for name in names}))
        labels = np.array([classes.index(name.split("/")[0]) for name in names], np.int64)
        return cls(Path(url), tuple(names), labels, classes, url=url)

    @property
    def where(self) -> str:
        return self.url

    def images(self) -> Iterator[Image.Image | BadImage]:
        for content in self.contents():
            try:
                yield decode(io.BytesIO(content))
            except BadImage as bad:
                yield bad

    def contents(self) -> Iterator[bytes]:
        files, root = _file_system(self.url)
        for name in self.names:
            try:
                path = f"{root}/{name}"
                yield files.cat_file(path, end=MAX_BYTES)
            except OSError:
                yield b""  # counted as a bad image when it is decoded


def _is_image(name: str) -> bool:
    parts = PurePosixPath(name)
    return parts.suffix.lower() in SUFFIXES and not any(part.startswith(".") for part in parts.parts)


def _file_system(url: str) -> tuple[Any, str]:
    """(file system, path in it)."""
    try:
        import fsspec
    except ImportError as error:
        raise MissingExtra("fsspec", "sweep") from error
    try:
        files, root = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:  # an unknown protocol, or one whose package is missing
        raise InputError(f"cannot open {url}: {error}") from error
    return files, str(root).rstrip("/")
