"""Images behind a URL are those of the same folder."""

from __future__ import annotations

from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from vit_export.artifacts import Preprocessing
from vit_export.calibration.images import open_images
from vit_export.calibration.preprocess import write_pixels
from vit_export.errors import InputError


def test_the_same_pixels_labels_and_digest(tmp_path: Path) -> None:
    """A folder of classes and the same files in fsspec's memory give one digest and equal pixels."""
    rng, memory = np.random.default_rng(0), fsspec.filesystem("memory")
    for index in range(8):
        path = tmp_path / f"class{index % 2}/{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
        memory.pipe_file(f"/photos/class{index % 2}/{index}.png", path.read_bytes())
    memory.pipe_file("/photos/class0/notes.txt", b"no image")
    memory.pipe_file("/photos/class1/broken.png", b"no image either")
    (tmp_path / "class1/broken.png").write_bytes(b"no image either")
    here, there = open_images(tmp_path), open_images("memory://photos")
    assert here.names == there.names and here.classes == there.classes == ("class0", "class1")
    assert here.digest() == there.digest() and there.where == "memory://photos"
    assert (
        here.sample(4, 7).names == there.sample(4, 7).names == there.take([]).names + there.sample(4, 7).names
    )
    contract = Preprocessing((16, 16))
    wanted = [i for i, name in enumerate(here.names) if "broken" not in name]
    sets = [
        write_pixels(s.take(wanted), contract, tmp_path / f"{i}.npy") for i, s in enumerate((here, there))
    ]
    assert np.array_equal(np.load(sets[0].pixels), np.load(sets[1].pixels))
    assert np.array_equal(sets[0].labels, sets[1].labels)
    with pytest.raises(InputError, match="1 of 9 images in memory://photos"):
        write_pixels(there, contract, tmp_path / "all.npy")


def test_parts_are_the_whole_and_known_by_it(tmp_path: Path) -> None:
    """Parts hold every image once, in order; their digests follow the whole's, without reading it again."""
    images = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(10))
    source = open_images(tmp_path / "a.npz")
    parts = source.parts(4)
    assert [len(part) for part in parts] == [4, 4, 2]
    assert sum((part.names for part in parts), ()) == source.names
    assert len({part.digest() for part in parts}) == 3 and all(part.known for part in parts)
    assert parts[1].take([0]).known == ""
    assert [p.digest() for p in open_images(tmp_path / "a.npz").parts(4)] == [p.digest() for p in parts]


@pytest.mark.parametrize("url", ["memory://nothing-here", "nosuch://bucket/photos"])
def test_a_bad_url_is_a_clear_error(url: str) -> None:
    """An empty place and an unknown protocol name the URL."""
    with pytest.raises(InputError, match=url):
        open_images(url)
