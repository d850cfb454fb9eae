"""Graphs that were exported for one image size: a .pt2 program, an .onnx file."""

from __future__ import annotations

from vit_export.artifacts import Positions, Size
from vit_export.models.config import AdaptConfig
from vit_export.models.geometry import Geometry
from vit_export.models.resizers import Resizer


class Fixed(Resizer):
    """Positions are constants of the graph, so there is one size; it is given, the graph does not tell."""

    positions = Positions.NONE

    def geometry(self) -> Geometry:
        size = self._size or (224, 224)
        return Geometry(size, size, size, fixed=True)

    def _resize(self, size: Size, config: AdaptConfig) -> tuple[str, ...]:
        raise AssertionError("a fixed size is checked before")  # pragma: no cover
