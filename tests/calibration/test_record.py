"""calibration.json holds what reached each layer."""

from __future__ import annotations

import msgspec
import numpy as np

from contracts.families import FAMILIES
from vit_export.artifacts import CalibrationRecord
from vit_export.calibration.collect import calibrate, watch
from vit_export.calibration.observers import MinMaxConfig
from vit_export.calibration.record import MOST_BINS, encode, record
from vit_export.export.program import trace


class Count:
    """How many values a layer read."""

    def __init__(self) -> None:
        self.values = 0

    def update(self, values: object, where: str = "") -> None:
        self.values += values.numel()  # type: ignore[attr-defined]


def test_every_value_is_counted_inside_the_extremes() -> None:
    """Each layer has at most 64 bins that enclose its extremes closely and count every value once."""
    program = trace(FAMILIES["timm vit"].load())
    images = [np.random.default_rng(0).standard_normal((4, 3, 32, 32), dtype=np.float32)]
    ranges = calibrate(program, images, MinMaxConfig())
    found = record(program, images, ranges)
    counts, _ = watch(program, images, lambda layer: Count())
    assert [layer.name for layer in found.layers] == [layer.name for layer in program.layers]
    for layer in found.layers:
        end = layer.first + layer.width * len(layer.counts)
        assert 8 < len(layer.counts) <= MOST_BINS
        assert layer.first <= layer.low < layer.first + layer.width
        assert end - 2 * layer.width <= layer.high <= end
        assert sum(layer.counts) == counts[layer.name].values and layer.clipped == 0
    assert msgspec.json.decode(encode(found), type=CalibrationRecord) == found
    assert len(encode(found)) < 400 * len(found.layers)
