"""Pictures inside a page: read from beside the report, checked, and made small."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from pathlib import Path, PurePosixPath

from PIL import Image

from vit_export.errors import InputError, UntrustedInput

_MAX_PIXELS = 16_000_000
_QUALITY = 80
# What Pillow's decoders raise on broken files; UnidentifiedImageError is an OSError.
_UNREADABLE = (
    OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


def data_uri(folder: Path, name: str) -> tuple[str, tuple[int, int]]:
    """`data:image/jpeg;base64,...` of a PNG or JPEG file in `folder`, and its (width, height).

    Raises UntrustedInput for a name that leaves the folder, InputError for what is no such picture.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise UntrustedInput(f"the picture {name} is outside {folder}")
    try:
        with Image.open(folder / path, formats=("PNG", "JPEG")) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise InputError(f"{folder / path} is too large: {image.width}x{image.height}")
            return encode(image.convert("RGB")), image.size
    except _UNREADABLE as error:
        raise InputError(f"the picture {folder / path} cannot be read: {error}") from error


def encode(image: Image.Image) -> str:
    """An RGB image as a JPEG data URI: a third of what PNG takes for photographs under colours."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
