"""Images in an .npz: streamed, and refused unless they are what they should be."""

from __future__ import annotations

import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from vit_export.calibration.images import open_images
from vit_export.errors import InputError

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 6, 5, 3), dtype=np.uint8)
LABELS = np.arange(20) % 4


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_rows_come_back_exactly(tmp_path: Path, save: object) -> None:
    """Images and labels are those that were saved, whole or as a sample."""
    path = tmp_path / "set.npz"
    save(path, images=PIXELS, labels=LABELS.astype(np.int16))  # type: ignore[operator]
    whole, part = open_images(path), open_images(path, limit=8, seed=1)
    np.testing.assert_array_equal([np.asarray(image) for image in whole.images()], PIXELS)
    rows = [int(name.split("[")[1][:-1]) for name in part.names]
    np.testing.assert_array_equal([np.asarray(image) for image in part.images()], PIXELS[rows])
    assert part.labels is not None and part.labels.dtype == np.int64
    assert sorted(part.labels.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert part.digest() == open_images(path, limit=8, seed=1).digest() != whole.digest()


def test_labels_are_optional_and_splits_are_keys(tmp_path: Path) -> None:
    """`calib_images` goes with `calib_labels`; without a split `images` is read; else the keys are named."""
    path = tmp_path / "set.npz"
    np.savez(path, calib_images=PIXELS[:3], eval_images=PIXELS[3:], eval_labels=LABELS[3:])
    assert len(open_images(path, split="calib")) == 3 and open_images(path, split="calib").labels is None
    np.testing.assert_array_equal(open_images(path, split="eval").labels, LABELS[3:])
    with pytest.raises(InputError, match="only calib_images, eval_images, eval_labels"):
        open_images(path)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": PIXELS.astype(np.float32)}, "float32"),
        ({"images": PIXELS[..., 0]}, r"\[20, 6, 5\]"),
        ({"images": PIXELS.transpose(0, 3, 1, 2).copy()}, r"\[20, 3, 6, 5\]"),
        ({"images": np.asfortranarray(PIXELS)}, "Fortran"),
        ({"images": PIXELS[:0]}, r"\[0, 6, 5, 3\]"),
        ({"images": np.array([{"a": 1}], dtype=object)}, "object"),
        ({"images": PIXELS, "labels": LABELS[:-1]}, "for 20 images"),
        ({"images": PIXELS, "labels": LABELS + 0.5}, "float64"),
        ({"images": PIXELS, "labels": np.array([None] * 20)}, "object"),
        ({"pictures": PIXELS}, "only pictures"),
    ],
)
def test_other_contents_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    """Each wrong dtype, layout, length or key is named; a pickle is never loaded."""
    path = tmp_path / "set.npz"
    np.savez(path, **arrays)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=message):
        open_images(path)


def test_a_damaged_archive_is_an_input_error(tmp_path: Path) -> None:
    """Not a zip, cut short, damaged inside, or claiming more images than it holds."""
    path = tmp_path / "set.npz"
    path.write_bytes(b"hello")
    with pytest.raises(InputError, match="not a readable"):
        open_images(path)
    np.savez_compressed(path, images=PIXELS)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="not a readable"):
        open_images(path)
    np.savez_compressed(path, images=np.random.default_rng(0).integers(0, 256, (50, 64, 64, 3), np.uint8))
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    path.write_bytes(damaged)
    source = open_images(path)
    with pytest.raises(InputError, match="broken at"):
        list(source.images())
    with zipfile.ZipFile(path, "w") as archive, archive.open("images.npy", "w") as member:
        np.lib.format.write_array_header_1_0(
            member, {"descr": "|u1", "fortran_order": False, "shape": (10**6, 64, 64, 3)}
        )
    with pytest.raises(InputError, match="cut short"):
        open_images(path)


def test_memory_is_one_image_not_the_archive(tmp_path: Path) -> None:
    """Streaming 200 images of 12 kB out of a 2.4 MB array never holds a quarter of it."""
    path = tmp_path / "set.npz"
    np.savez_compressed(path, images=np.full((200, 64, 64, 3), 7, np.uint8))
    tracemalloc.start()
    try:
        assert sum(1 for _ in open_images(path).images()) == 200
        assert tracemalloc.get_traced_memory()[1] < 600_000
    finally:
        tracemalloc.stop()
