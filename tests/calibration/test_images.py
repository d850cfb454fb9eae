"""Image sources: what is listed, what is decoded, what is refused."""

from __future__ import annotations

import os
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vit_export.calibration.images import BadImage, decode, open_images
from vit_export.errors import InputError


def gradient(height: int = 24, width: int = 32) -> np.ndarray:
    """A photo-like uint8 [H, W, 3] without symmetry."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], -1).astype(
        np.uint8
    )


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def read(content: bytes) -> np.ndarray:
    image = decode(BytesIO(content))
    assert image.mode == "RGB"
    return np.asarray(image)


def png_claiming(width: int, height: int) -> bytes:
    """A well-formed PNG header of this size with almost no data behind it."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 64))
        + chunk(b"IEND", b"")
    )


RGB = Image.fromarray(gradient())
GREY = RGB.convert("L")

UNUSABLE: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "text": lambda: b"not an image at all\n" * 40,
    "truncated jpeg": lambda: encoded(RGB, "JPEG")[:-120],
    "truncated png": lambda: encoded(RGB, "PNG")[:-60],
    "truncated gif": lambda: encoded(RGB, "GIF")[:-200],
    "truncated webp": lambda: encoded(RGB, "WEBP")[: len(encoded(RGB, "WEBP")) // 2],
    "truncated tiff": lambda: encoded(RGB, "TIFF")[:400],
    "truncated bmp": lambda: encoded(RGB, "BMP")[:-500],
    "png header only": lambda: encoded(RGB, "PNG")[:33],
    "flipped bits": lambda: encoded(RGB, "PNG")[:60] + b"\xff" * 40 + encoded(RGB, "PNG")[100:],
    "bomb": lambda: png_claiming(60_000, 60_000),
    "just above the limit": lambda: png_claiming(14_000, 13_000),
    "postscript": lambda: encoded(RGB, "EPS"),
    "svg": lambda: b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>',
    "float tiff": lambda: encoded(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"),
    "int32 tiff": lambda: encoded(Image.fromarray(np.ones((8, 8), np.int32)), "TIFF"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_content_is_a_bad_image(name: str) -> None:
    """Nothing that Pillow may raise on a broken, huge or foreign file escapes as another error."""
    with pytest.raises(BadImage):
        decode(BytesIO(UNUSABLE[name]()))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "TIFF", "PPM", "WEBP", "JPEG", "JPEG2000"])
def test_every_raster_format_is_read_by_content(kind: str) -> None:
    """The format comes from the bytes; lossless ones come back exactly, lossy ones nearly."""
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    source = RGB.quantize(200).convert("RGB") if kind == "GIF" else RGB
    expected = np.asarray(source)
    difference = np.abs(read(encoded(source, kind, **options)).astype(int) - expected).max()
    assert difference <= {"JPEG": 24, "JPEG2000": 0}.get(kind, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    """All eight EXIF orientations show the picture upright."""
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = RGB.transpose(undo[orientation]) if orientation > 1 else RGB
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(read(encoded(stored, "PNG", exif=exif)), np.asarray(RGB))


def test_sixteen_bit_grey_keeps_its_high_byte() -> None:
    """16-bit PNG and TIFF are scaled to 8 bits, where Pillow's own conversion would clip to white."""
    deep = (np.asarray(GREY).astype(np.uint16) << 8) + 99
    for kind in ("PNG", "TIFF"):
        np.testing.assert_array_equal(
            read(encoded(Image.fromarray(deep), kind)), np.asarray(GREY.convert("RGB"))
        )


def test_grey_bilevel_and_palette_become_rgb() -> None:
    """Other modes are the same picture in three channels."""
    np.testing.assert_array_equal(read(encoded(GREY, "PNG")), np.asarray(GREY.convert("RGB")))
    bilevel = GREY.convert("1")
    np.testing.assert_array_equal(read(encoded(bilevel, "PNG")), np.asarray(bilevel.convert("RGB")))
    palette = RGB.quantize(64)
    np.testing.assert_array_equal(read(encoded(palette, "PNG")), np.asarray(palette.convert("RGB")))


def test_cmyk_jpeg_is_not_inverted() -> None:
    """A CMYK JPEG comes back near the RGB picture it was made from."""
    content = encoded(RGB.convert("CMYK"), "JPEG", quality=98)
    assert np.abs(read(content).astype(int) - gradient()).mean() < 4


def test_alpha_is_dropped_like_timm_does() -> None:
    """Colours under transparent pixels are kept, in RGBA and in a palette with transparency."""
    alpha = Image.fromarray(np.linspace(0, 255, 24 * 32).reshape(24, 32).astype(np.uint8))
    cut = RGB.copy()
    cut.putalpha(alpha)
    np.testing.assert_array_equal(read(encoded(cut, "PNG")), gradient())
    palette = RGB.quantize(16)
    content = encoded(palette, "PNG", transparency=bytes(range(0, 256, 16)))
    np.testing.assert_array_equal(read(content), np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_of_an_animation(kind: str) -> None:
    """An animated or multi-page file counts as its first frame."""
    frames = [Image.new("RGB", (9, 9), color) for color in ("#102030", "white", "red")]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert read(content)[4, 4].tolist() == [0x10, 0x20, 0x30]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of 6, 3 and 1 images, an empty class and what else lies around in folders."""
    for name, count in {"ant": 6, "bee": 3, "cat": 0, "dog": 1}.items():
        (tmp_path / name).mkdir()
        for number in range(count):
            Image.fromarray(gradient() + np.uint8(number)).save(tmp_path / name / f"{number}.png")
    (tmp_path / ".cache").mkdir()
    RGB.save(tmp_path / ".cache" / "hidden.png")
    (tmp_path / "README.txt").write_text("ten photos")
    (tmp_path / "ant" / "folder.png").mkdir()
    (tmp_path / "bee" / "dangling.jpg").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "dog" / "pipe.jpg")
    return tmp_path


def test_sub_folders_are_classes_in_sorted_order(folder: Path) -> None:
    """An empty folder keeps its index; hidden files, other files, pipes and dead links are no images."""
    source = open_images(folder)
    assert source.classes == ("ant", "bee", "cat", "dog")
    assert source.labels is not None
    assert Counter(source.labels.tolist()) == {0: 6, 1: 3, 3: 1}
    assert list(source.names) == sorted(source.names) and len(source) == 10
    assert all(isinstance(image, Image.Image) for image in source.images())


def test_a_flat_folder_has_no_labels(folder: Path) -> None:
    """Images at the top make it one set, sub-folders included."""
    RGB.save(folder / "top.JPG", "PNG")
    source = open_images(folder)
    assert source.labels is None and source.classes == () and len(source) == 11


def test_linked_folders_are_read_once(folder: Path) -> None:
    """A link back up does not loop."""
    (folder / "ant" / "up").symlink_to(folder)
    assert len(open_images(folder)) == 10


def test_a_sample_is_seeded_and_stratified(folder: Path) -> None:
    """The same seed draws the same images, each class in its proportion; another seed draws others."""
    first, again = (open_images(folder, limit=5, seed=7) for _ in range(2))
    assert first.names == again.names and len(first) == 5
    assert first.labels is not None
    assert Counter(first.labels.tolist()) == {0: 3, 1: 1, 3: 1} or Counter(first.labels.tolist()) == {
        0: 3,
        1: 2,
    }
    assert {open_images(folder, limit=5, seed=seed).names for seed in range(6)} != {first.names}
    assert open_images(folder, limit=99).names == open_images(folder).names
    with pytest.raises(InputError, match="cannot take 0"):
        open_images(folder, limit=0)


def test_digest_follows_names_and_bytes(folder: Path) -> None:
    """Any changed byte, name or selection changes the digest; reading twice does not."""
    before = open_images(folder).digest()
    assert open_images(folder).digest() == before
    assert open_images(folder, limit=9).digest() != before
    (folder / "ant" / "0.png").rename(folder / "ant" / "0.jpg")
    renamed = open_images(folder).digest()
    (folder / "ant" / "1.png").write_bytes(b"other")
    assert len({before, renamed, open_images(folder).digest()}) == 3


def test_nothing_to_read_is_one_clear_error(tmp_path: Path) -> None:
    """A missing path, an empty folder and a file that is neither folder nor .npz."""
    with pytest.raises(InputError, match="no images at"):
        open_images(tmp_path / "missing")
    with pytest.raises(InputError, match="no images in"):
        open_images(tmp_path)
    RGB.save(tmp_path / "one.png")
    with pytest.raises(InputError, match=r"not a folder or an \.npz"):
        open_images(tmp_path / "one.png")


def test_images_arrive_lazily(folder: Path) -> None:
    """Opening and iterating touches one file at a time: a file removed later is missed only when reached."""
    source = open_images(folder)
    images = source.images()
    assert isinstance(next(images), Image.Image)
    (folder / "ant" / "1.png").unlink()
    assert isinstance(next(images), BadImage)
    assert isinstance(next(images), Image.Image)
