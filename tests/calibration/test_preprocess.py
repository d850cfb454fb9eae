"""Pixels as timm would make them, written once, read in pieces."""

from __future__ import annotations

import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision import transforms

from vit_export.artifacts import CropMode, Interpolation, Preprocessing
from vit_export.calibration.images import BadImage, open_images
from vit_export.calibration.preprocess import batches, pixel_batches, to_pixels, write_pixels
from vit_export.errors import InputError

SOURCES = [(37, 61), (61, 37), (50, 50), (224, 300), (9, 7), (333, 100), (48, 48)]


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth colours with noise: every resampling filter changes it."""
    generator = np.random.default_rng(seed)
    small = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray(
        np.clip(smooth + generator.integers(-30, 30, (height, width, 3)), 0, 255).astype(np.uint8)
    )


def timm_pixels(image: Image.Image, contract: Preprocessing) -> np.ndarray:
    """What timm's evaluation transform feeds its normalisation."""
    transform = create_transform(
        (3, *contract.size),
        is_training=False,
        interpolation=contract.interpolation.value,
        crop_pct=contract.crop_pct,
        crop_mode=contract.crop_mode.value,
        normalize=False,
    )
    return np.asarray(transform(image)).transpose(1, 2, 0)


@pytest.mark.parametrize("mode", CropMode)
@pytest.mark.parametrize("size", [(48, 48), (33, 33), (48, 64), (65, 30)])
@pytest.mark.parametrize("crop_pct", [1.0, 0.875, 0.9, 0.95, 1.1])
def test_pixels_are_timms_bit_for_bit(mode: CropMode, size: tuple[int, int], crop_pct: float) -> None:
    """Every crop mode, ratio and (non-)square size gives exactly timm's pixels, for images of any aspect."""
    for source, interpolation in product(SOURCES, (Interpolation.BICUBIC, Interpolation.BILINEAR)):
        contract = Preprocessing(size, interpolation=interpolation, crop_pct=crop_pct, crop_mode=mode)
        image = photo(*source)
        np.testing.assert_array_equal(to_pixels(image, contract), timm_pixels(image, contract), str(source))


@pytest.mark.parametrize("name", Interpolation)
def test_center_mode_is_torchvisions_resize_and_crop(name: Interpolation) -> None:
    """Resize(short side) and CenterCrop of torchvision, for each filter."""
    mode = {
        Interpolation.NEAREST: transforms.InterpolationMode.NEAREST,
        Interpolation.BILINEAR: transforms.InterpolationMode.BILINEAR,
        Interpolation.BICUBIC: transforms.InterpolationMode.BICUBIC,
        Interpolation.LANCZOS: transforms.InterpolationMode.LANCZOS,
    }[name]
    reference = transforms.Compose([transforms.Resize(256, mode), transforms.CenterCrop(224)])
    contract = Preprocessing((224, 224), interpolation=name, crop_pct=0.875)
    for source in [(300, 200), (201, 333), (256, 256), (500, 1024)]:
        image = photo(*source)
        np.testing.assert_array_equal(to_pixels(image, contract), np.asarray(reference(image)))


def test_normalised_values_are_timms() -> None:
    """The float tensor differs from timm's (which divides twice) by rounding only."""
    contract = Preprocessing((48, 48), crop_pct=0.875)
    image = photo(80, 60)
    reference = create_transform(48, is_training=False, interpolation="bicubic", crop_pct=0.875)(image)
    ours = contract.normalize(to_pixels(image, contract)[None])[0]
    np.testing.assert_allclose(ours, reference.numpy(), atol=1e-6)


def test_other_modes_and_endless_strips() -> None:
    """A grey image is converted; a strip that would be resized to gigabytes is a bad image, not a crash."""
    grey = photo(40, 40).convert("L")
    pixels = to_pixels(grey, Preprocessing((16, 16)))
    assert pixels.shape == (16, 16, 3) and (pixels[..., 0] == pixels[..., 2]).all()
    with pytest.raises(BadImage, match="would be resized"):
        to_pixels(Image.new("RGB", (20_000, 1)), Preprocessing((224, 224)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of 25 and 15 images of different sizes."""
    for index in range(40):
        place = tmp_path / "photos" / ("a" if index < 25 else "b")
        place.mkdir(parents=True, exist_ok=True)
        photo(30 + index, 50 - index // 2, index).save(place / f"{index:02d}.png")
    return tmp_path / "photos"


def test_written_pixels_are_the_images_in_order(folder: Path, tmp_path: Path) -> None:
    """The file is an ordinary .npy; batches of any size give its images, normalised as the contract says."""
    contract = Preprocessing((16, 24))
    source = open_images(folder)
    written = write_pixels(source, contract, tmp_path / "set.npy")
    expected = np.stack([to_pixels(image, contract) for image in source.images()])  # type: ignore[arg-type]
    np.testing.assert_array_equal(np.load(written.pixels), expected)
    assert (written.count, written.names, written.skipped) == (40, source.names, ())
    np.testing.assert_array_equal(written.labels, source.labels)
    for size in (1, 7, 40, 64):
        parts = list(batches(written, size))
        assert max(map(len, parts)) <= size and parts[0].dtype == np.float32 and parts[0].flags.c_contiguous
        np.testing.assert_array_equal(np.concatenate(parts), contract.normalize(expected))
    assert [path.name for path in tmp_path.iterdir()] == ["photos", "set.npy"] or len(
        list(tmp_path.iterdir())
    ) == 2


def test_broken_images_are_left_out_with_their_labels(folder: Path, tmp_path: Path) -> None:
    """Two of forty are skipped and named; the rest keep their labels, and the file's count is right."""
    (folder / "a" / "03.png").write_bytes(b"")
    content = (folder / "b" / "30.png").read_bytes()
    (folder / "b" / "30.png").write_bytes(content[: len(content) // 2])
    written = write_pixels(open_images(folder), Preprocessing((16, 16)), tmp_path / "set.npy")
    assert written.count == 38 == len(written.names) == len(np.load(written.pixels))
    assert [line.split(":")[0] for line in written.skipped] == ["a/03.png", "b/30.png"]
    assert written.labels is not None and written.labels.tolist() == [0] * 24 + [1] * 14
    survivors = np.concatenate(list(pixel_batches(written, 5)))
    image = Image.open(folder / written.names[-1])
    np.testing.assert_array_equal(survivors[-1], to_pixels(image, written.preprocessing))


def test_more_than_five_percent_broken_is_an_error(folder: Path, tmp_path: Path) -> None:
    """Three of forty stop the run with the count and an example; no file is left behind."""
    for name in ("00", "01", "02"):
        (folder / "a" / f"{name}.png").write_text("gone")
    with pytest.raises(InputError, match=r"3 of 40 images .* cannot be read\n  the first: a/00.png"):
        write_pixels(open_images(folder), Preprocessing((16, 16)), tmp_path / "set.npy")
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_an_existing_file_survives_a_failed_run(folder: Path, tmp_path: Path) -> None:
    """The old pixels stay whole until the new ones are complete."""
    target = tmp_path / "set.npy"
    before = write_pixels(open_images(folder), Preprocessing((16, 16)), target)
    content = target.read_bytes()
    for path in (folder / "b").iterdir():
        path.write_bytes(b"x")
    with pytest.raises(InputError):
        write_pixels(open_images(folder), Preprocessing((16, 16)), target)
    assert target.read_bytes() == content
    assert sum(map(len, pixel_batches(before, 8))) == 40


def test_pixels_of_another_shape_are_refused(tmp_path: Path, folder: Path) -> None:
    """A file that does not hold what the set says is an input error before any image is read."""
    written = write_pixels(open_images(folder), Preprocessing((16, 16)), tmp_path / "set.npy")
    np.save(written.pixels, np.zeros((40, 16, 17, 3), np.uint8))
    with pytest.raises(InputError, match=r"is uint8 \[40, 16, 17, 3\]"):
        next(pixel_batches(written, 4))


def test_preprocessing_needs_no_torch() -> None:
    """Devices preprocess with Pillow and numpy alone: importing these modules does not import torch."""
    code = (
        "import sys; import vit_export.calibration.preprocess, vit_export.calibration.npz, "
        "vit_export.calibration.checks, vit_export.calibration.plan, vit_export.calibration.observers; "
        "print([m for m in ('torch', 'timm', 'onnx', 'torchvision') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
    assert torch.__version__  # and this process has it, so the test means something
