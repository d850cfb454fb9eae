"""Which sizes fit, and what the error names when one does not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vit_export.artifacts import Size
from vit_export.errors import BadSize
from vit_export.models.geometry import Geometry

steps = st.tuples(st.integers(1, 40), st.integers(1, 40))
sizes = st.tuples(st.integers(1, 600), st.integers(1, 600))


def test_the_error_of_the_style_guide() -> None:
    """200x300 at patch 16 names the rule and the two nearest sizes."""
    with pytest.raises(BadSize) as caught:
        Geometry((224, 224), (16, 16)).check((200, 300), "vit_small_patch16_224")
    assert str(caught.value) == (
        "--image-size 200x300 does not fit vit_small_patch16_224\n"
        "  each side must be a multiple of 16; nearest: 192x304, 208x304"
    )


def test_a_square_that_does_not_fit_names_squares() -> None:
    """100x100 at steps of 32 is answered with the squares around it, not with 96x128."""
    with pytest.raises(BadSize, match=r"nearest: 96x96, 128x128$"):
        Geometry((224, 224), (32, 32)).check((100, 100), "m")


@given(steps, steps, sizes)
def test_named_sizes_are_valid_and_nearest(multiple: Size, minimum: Size, asked: Size) -> None:
    """What the error names passes the check, and no valid size is closer than the first one."""
    geometry = Geometry((9999, 9999), multiple, minimum)
    nearest = geometry.nearest(asked)
    for size in nearest:
        geometry.check(size, "m")

    def away(size: Size) -> int:
        return abs(size[0] - asked[0]) + abs(size[1] - asked[1])

    sides = [
        [s for s in range(m, asked[i] + 2 * m + low, m) if s >= low]
        for i, (m, low) in enumerate(zip(multiple, minimum, strict=True))
    ]
    assert away(nearest[0]) == min(abs(s - asked[0]) for s in sides[0]) + min(
        abs(s - asked[1]) for s in sides[1]
    )


def test_below_the_minimum() -> None:
    """A size smaller than one window names the minimum and the first size that works."""
    geometry = Geometry((224, 224), (32, 32), (28, 28), "one window of 7")
    geometry.check((32, 32), "swin")
    with pytest.raises(BadSize, match="nearest: 64x64"):
        Geometry((224, 224), (32, 32), (56, 56), "one window of 14").check((32, 32), "swin")


def test_a_fixed_size_has_no_other() -> None:
    """An exported graph takes its own size alone, and says which."""
    geometry = Geometry((64, 96), (64, 96), fixed=True)
    geometry.check((64, 96), "model.onnx")
    with pytest.raises(BadSize, match="exported for 64x96 and has no other size; nearest: 64x96"):
        geometry.check((128, 192), "model.onnx")


def test_nonsquare_steps_are_named_per_side() -> None:
    """A patch of 16x8 says which side must be a multiple of what."""
    with pytest.raises(BadSize, match=r"a multiple of 16 \(height\) and 8 \(width\)"):
        Geometry((32, 32), (16, 8)).check((40, 40), "m")
