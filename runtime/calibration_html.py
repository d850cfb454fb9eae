"""Calibration in report.html: a small histogram of each layer's input with the range that was chosen.

Drawn by hand, as one path a layer: fifty charts of a plotting library would be most of the page.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import msgspec

from vit_export.artifacts import CalibrationRecord, LayerHistogram
from vit_export.errors import InputError
from vit_export.runtime.html_tree import Node, el

_WIDTH, _HEIGHT = 240, 56
_MAX_BYTES = 16 << 20
_LEGEND = (
    "How often each value reached the layer, counts on a logarithmic scale, on {images} calibration "
    "images. Coloured lines: the range that {method} chose; what is outside is clipped."
)


def read(output: Path) -> list[CalibrationRecord]:
    """Every calibration*.json beside a report. Raises InputError for one that is broken."""
    return [_decode(path) for path in sorted(output.glob("calibration*.json"))]


def parts(records: list[CalibrationRecord]) -> Iterator[Node]:
    """For each image size its legend and, folded away, a drawing of every layer."""
    for found in records:
        size = f"{found.image_size[0]}x{found.image_size[1]}"
        words = f"Histograms of {len(found.layers)} layers at {size}"
        yield el("p", _LEGEND.format(images=found.images, method=found.method), class_="soft")
        drawn = el("ul", *map(_layer, found.layers), class_="histograms")
        yield el("details", el("summary", words), drawn)


def _decode(path: Path) -> CalibrationRecord:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InputError(f"{path} is too large: {path.stat().st_size} bytes")
        found = msgspec.json.decode(path.read_bytes(), type=CalibrationRecord)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}", "delete it, or export again") from error
    for layer in found.layers:
        numbers = (layer.low, layer.high, layer.first, layer.width)
        if (
            not layer.counts
            or min(layer.counts) < 0
            or layer.width <= 0
            or not all(map(math.isfinite, numbers))
        ):
            raise InputError(f"{path} is not a calibration record: {layer.name}")
    return found


def _layer(layer: LayerHistogram) -> Node:
    end = layer.first + layer.width * len(layer.counts)
    chosen = f"range {layer.low:.3g} to {layer.high:.3g}"
    clipped = f", {100 * layer.clipped:.2g} % clipped" if layer.clipped else ""
    seen = f"values {layer.first:.3g} to {end:.3g}"
    drawing = el(
        "svg",
        el("path", d=_bars(layer), class_="count"),
        *(_line(layer, end, value) for value in (layer.low, layer.high)),
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=f"{layer.name}: {seen}, {chosen}{clipped}",
    )
    return el("li", el("b", layer.name), drawing, el("span", f"{seen}; {chosen}{clipped}", class_="soft"))


def _bars(layer: LayerHistogram) -> str:
    step, most = _WIDTH / len(layer.counts), math.log1p(max(layer.counts)) or 1.0
    heights = [_HEIGHT * math.log1p(count) / most for count in layer.counts]
    boxes = (f"M{i * step:.1f} {_HEIGHT}v-{h:.1f}h{step:.1f}v{h:.1f}z" for i, h in enumerate(heights) if h)
    return "".join(boxes)


def _line(layer: LayerHistogram, end: float, value: float) -> Node:
    x = _WIDTH * min(max((value - layer.first) / (end - layer.first), 0.0), 1.0)
    return el("path", d=f"M{min(max(x, 1), _WIDTH - 1):.1f} 0V{_HEIGHT}", class_="range")
