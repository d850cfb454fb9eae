"""Which image sizes a model can take, and the nearest ones to a size that it cannot. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from vit_export.artifacts import Size
from vit_export.errors import BadSize


@dataclass(frozen=True, slots=True)
class Geometry:
    """The image sizes a model takes; all are (height, width) in pixels.

    size: what it takes now. multiple: each side must be a multiple of it. minimum: no side below it;
    `reason` says what sets the multiple, in words ("patch 16", "patch 4, window 7").
    fixed: only `size` itself works (an exported program).
    """

    size: Size
    multiple: Size
    minimum: Size = (1, 1)
    reason: str = ""
    fixed: bool = False

    def grid(self, size: Size) -> Size:
        """`size` in units of `multiple`."""
        return size[0] // self.multiple[0], size[1] // self.multiple[1]

    def check(self, size: Size, model: str) -> None:
        """Raise BadSize, with the nearest valid sizes, when the model cannot take `size`."""
        if size == self.size or (not self.fixed and self._fits(size)):
            return
        nearest = (self.size,) if self.fixed else self.nearest(size)
        raise BadSize([show(size)], model, self.rule(), [show(n) for n in nearest])

    def nearest(self, size: Size, count: int = 2) -> tuple[Size, ...]:
        """The valid sizes closest to `size`, nearest first; square ones for a square where sides are alike.

        >>> Geometry((224, 224), (16, 16)).nearest((200, 300))
        ((192, 304), (208, 304))
        >>> Geometry((224, 224), (32, 32)).nearest((100, 100))
        ((96, 96), (128, 128))
        """
        sides = [_around(s, m, low) for s, m, low in zip(size, self.multiple, self.minimum, strict=True)]
        alike = size[0] == size[1] and sides[0] == sides[1]
        sizes = [(side, side) for side in sides[0]] if alike else [(h, w) for h, w in product(*sides)]
        return tuple(sorted(sizes, key=lambda s: (abs(s[0] - size[0]) + abs(s[1] - size[1]), s))[:count])

    def _fits(self, size: Size) -> bool:
        sides = zip(size, self.multiple, self.minimum, strict=True)
        return all(side % step == 0 and side >= low for side, step, low in sides)

    def rule(self) -> str:
        """What a size must be, in words: `each side must be a multiple of 16 (patch 16)`."""
        if self.fixed:
            return f"it was exported for {show(self.size)} and has no other size"
        height, width = self.multiple
        step = str(height) if height == width else f"{height} (height) and {width} (width)"
        rule = f"each side must be a multiple of {step}"
        if any(low > m for low, m in zip(self.minimum, self.multiple, strict=True)):
            rule += f" and at least {show(self.minimum)}"
        return f"{rule} ({self.reason})" if self.reason else rule


def show(size: Size) -> str:
    """`(224, 288)` as users type it: `224x288`."""
    return f"{size[0]}x{size[1]}"


def _around(side: int, step: int, low: int) -> set[int]:
    """The multiples of `step` next to `side`, none below `low`."""
    least = max(step, -(-low // step) * step)
    below = side // step * step
    return {max(least, below), max(least, below + step)} if side % step else {max(least, side)}
