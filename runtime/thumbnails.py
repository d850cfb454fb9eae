"""OUTPUT/flips: small pictures of the images whose class an artifact changed, and their names.

flips/224x224/17.jpg is image 17 as the network saw it, resized and cropped; flips/names.json says which file
of the evaluation set it was. report.json stays small and the pictures open anywhere.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec
import numpy as np
from PIL import Image

from vit_export.artifacts import EvalSet, Size
from vit_export.errors import InputError
from vit_export.runtime.files import atomic_directory
from vit_export.runtime.flips import flips
from vit_export.runtime.report_schema import Report

FOLDER = "flips"
MOST = 24  # for one artifact
_SIDE = 112  # pixels, the longer one
_NAMES = "names.json"

Names = dict[str, dict[str, str]]  # image size → image index → name


def write(report: Report, images: Iterable[EvalSet], output: Path) -> None:
    """Keep the first MOST changed images of each artifact; no folder if no prediction changed."""
    wanted = {one: sorted(chosen) for one in images if (chosen := _changed(report, one.preprocessing.size))}
    if not wanted:
        return
    with atomic_directory(output / FOLDER) as folder:
        names: Names = {}
        for one, indices in wanted.items():
            place = folder / _name(one.preprocessing.size)
            place.mkdir()
            pixels = np.load(one.pixels, mmap_mode="r")
            for index in indices:
                (place / f"{index}.jpg").write_bytes(_thumbnail(pixels[index]))
            if one.names:
                names[place.name] = {str(index): one.names[index] for index in indices}
        (folder / _NAMES).write_bytes(msgspec.json.encode(names))


def find(output: Path, size: Size, index: int) -> str | None:
    """The thumbnail of an image as a name below `output`, None if there is none."""
    name = f"{FOLDER}/{_name(size)}/{index}.jpg"
    return name if (output / name).is_file() else None


def read_names(output: Path) -> Mapping[tuple[str, int], str]:
    """Names by (`224x224`, index); empty if none were kept. Raises InputError for a broken file."""
    path = output / FOLDER / _NAMES
    if not path.is_file():
        return {}
    try:
        names = msgspec.json.decode(path.read_bytes(), type=dict[str, dict[int, str]])
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    return {(size, index): name for size, found in names.items() for index, name in found.items()}


def _changed(report: Report, size: Size) -> set[int]:
    found = [flips(report, result) or () for result in report.results if result.image_size == size]
    return {flip.image for changed in found for flip in changed[:MOST]}


def _thumbnail(pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> bytes:
    image = Image.fromarray(np.asarray(pixels))
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return file.getvalue()


def _name(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
