"""Attention maps over their image: FP32, int8 and their difference, one column a head, as one picture.

Colours of a column run from 0 to its largest weight in either precision, so the two rows compare; columns do
not. Pillow and numpy draw: a plotting library would be a dependency for one blend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from vit_export.runtime.report_cells import printable

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

# Ten stops of inferno (S. van der Walt and N. Smith 2015, CC0): even steps in lightness, safe for the
# colour-blind and in print. For differences five of ColorBrewer's RdBu, reversed (C. Brewer, Apache-2.0).
INFERNO = (
    "000004", "1b0c41", "4a0c6b", "781c6d", "a52c60", "cf4446", "ed6925", "fb9b06", "f7d13d", "fcffa4",
)  # fmt: skip
DIFFERENCE = ("0571b0", "92c5de", "f7f7f7", "f4a582", "ca0020")

_WIDTH = 1600  # of a picture, about
_PANELS = (48, 128)  # smallest and largest side of one panel
_LABEL, _TOP, _GAP = 84, 18, 4  # pixels left of, above and between panels
_BLEND = 0.6
_FACTORS = (1000, 500, 200, 100, 50, 20, 10, 5, 2, 1)


@dataclass(frozen=True, slots=True)
class Column:
    """One map in both precisions, [rows, columns], and what stands above it."""

    title: str
    in_float: Floats
    in_int8: Floats | None


def heat(values: Floats, stops: Sequence[str] = INFERNO) -> Bytes:
    """[..., 3] colours of values in 0..1, between evenly spaced stops.

    >>> heat(np.float32([0, 1])).tolist()
    [[0, 0, 4], [252, 255, 164]]
    """
    table = np.array([list(bytes.fromhex(stop)) for stop in stops], np.float32)
    place = np.clip(values, 0, 1) * (len(table) - 1)
    low = np.minimum(place.astype(np.int64), len(table) - 2)
    part = (place - low)[..., None]
    colours: Bytes = np.rint(table[low] * (1 - part) + table[low + 1] * part).astype(np.uint8)
    return colours


def overlay(pixels: Bytes, colours: Bytes, side: int) -> Image.Image:
    """Colours [rows, columns, 3] of each patch over the greyed image [H, W, 3], its long side as given."""
    image = Image.fromarray(pixels)
    scale = side / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    grey = image.resize(size, Image.Resampling.BILINEAR).convert("L").convert("RGB")
    # Patches keep their edges: the map has no more detail than its grid.
    return Image.blend(grey, Image.fromarray(colours).resize(size, Image.Resampling.NEAREST), _BLEND)


def sheet(pixels: Bytes, columns: Sequence[Column]) -> Image.Image:
    """Rows FP32, int8 and difference (FP32 alone without int8) for each column, with their names."""
    side = min(_PANELS[1], max(_PANELS[0], _WIDTH // (len(columns) + 1) - _GAP))
    factor = magnification(columns)
    panels = [_panels(pixels, column, side, factor) for column in columns]
    names = ("FP32", "int8", f"change x{factor}")[: len(panels[0])]
    width, height = panels[0][0].width + _GAP, panels[0][0].height + _GAP
    page = Image.new("RGB", (_LABEL + width * len(panels), _TOP + height * len(names)), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    for row, name in enumerate(names):
        draw.text((2, _TOP + row * height + height // 2 - 6), name, "black", font)
    for i, (column, cells) in enumerate(zip(columns, panels, strict=True)):
        draw.text((_LABEL + i * width + 2, 3), _fitting(column.title, width, font), "black", font)
        for row, cell in enumerate(cells):
            page.paste(cell, (_LABEL + i * width, _TOP + row * height))
    return page


def magnification(columns: Sequence[Column]) -> int:
    """By how much a sheet enlarges its changes so that they can be seen: 1, 2, 5, 10, ... at most 1000."""
    changes = [np.abs(c.in_int8 - c.in_float).max() / _largest(c) for c in columns if c.in_int8 is not None]
    most = float(max(changes, default=1.0))
    return next(factor for factor in _FACTORS if factor * most <= 1 or factor == 1)


def _largest(column: Column) -> float:
    other = 0.0 if column.in_int8 is None else float(column.in_int8.max())
    return max(float(column.in_float.max()), other) or 1.0


def _panels(pixels: Bytes, column: Column, side: int, factor: int) -> list[Image.Image]:
    largest = _largest(column)
    drawn = [overlay(pixels, heat(column.in_float / largest), side)]
    if column.in_int8 is not None:
        change = factor * (column.in_int8 - column.in_float) / largest
        drawn.append(overlay(pixels, heat(column.in_int8 / largest), side))
        drawn.append(overlay(pixels, heat(0.5 + 0.5 * change, DIFFERENCE), side))
    return drawn


def _fitting(title: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """The title's end, which tells one layer from another, as far as it fits."""
    text = printable(title)
    while len(text) > 1 and font.getlength(text) > width - _GAP:
        text = text[1:]
    return text
