"""What lies beside a report: thumbnails, calibration records, attention; and what must not be believed."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from contracts.sample_report import IMAGES, report, result
from vit_export.artifacts import CalibrationRecord, EvalSet, LayerHistogram, Preprocessing
from vit_export.errors import InputError, UntrustedInput
from vit_export.runtime import attention_file, beside, calibration_html, report_files, report_html, thumbnails
from vit_export.runtime.attention_file import AttentionFile, AttentionImage, AttentionLayer
from vit_export.runtime.attention_pictures import Column, heat, magnification, sheet
from vit_export.runtime.pictures import data_uri
from vit_export.runtime.report_schema import PackedIds, Report


def flipped(count: int) -> Report:
    """A report whose artifact changes the first `count` images."""
    labels = np.arange(IMAGES) % 10
    after = labels.copy()
    after[:count] = (after[:count] + 1) % 10
    base = report(result(predictions=PackedIds.pack(after)))
    baseline = msgspec.structs.replace(base.baseline, predictions=PackedIds.pack(labels))
    return msgspec.structs.replace(base, baseline=baseline)


def pixels(folder: Path) -> EvalSet:
    path = folder / "pixels.npy"
    np.save(path, np.full((IMAGES, 300, 200, 3), 99, np.uint8))
    return EvalSet(path, Preprocessing((224, 224)), IMAGES)


def test_thumbnails_are_few_and_small(tmp_path: Path) -> None:
    """At most MOST small pictures an artifact are kept, and none in a run without flips."""
    thumbnails.write(flipped(60), [pixels(tmp_path)], tmp_path)
    kept = sorted((tmp_path / "flips" / "224x224").iterdir())
    assert len(kept) == thumbnails.MOST and all(file.stat().st_size < 8000 for file in kept)
    with Image.open(kept[0]) as image:
        assert max(image.size) == 112
    beside.clear(tmp_path)
    thumbnails.write(flipped(0), [pixels(tmp_path)], tmp_path)
    assert not (tmp_path / "flips").exists()


def test_a_page_without_pictures_lists_the_flips(tmp_path: Path) -> None:
    """A report read without its folder still says which image went where."""
    page = report_html.render(flipped(3), tmp_path).decode()
    assert "3 of 200 images changed class" in page or f"3 of {IMAGES} images changed class" in page
    assert "<img" not in page


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "a/../../b.png", "..\\b.png"])
def test_pictures_stay_in_their_folder(tmp_path: Path, name: str) -> None:
    """A file name that leaves the report's folder is refused, not read."""
    with pytest.raises(UntrustedInput, match="outside"):
        data_uri(tmp_path, name)


def test_what_is_no_picture_is_an_error(tmp_path: Path) -> None:
    """Text in the place of a picture stops the page with the file's name."""
    (tmp_path / "a.png").write_text("<svg onload='alert(1)'>")
    with pytest.raises(InputError, match=r"a\.png cannot be read"):
        data_uri(tmp_path, "a.png")


@pytest.mark.parametrize("side", [5000, 60000])
def test_a_picture_that_would_unfold_is_refused(tmp_path: Path, side: int) -> None:
    """A small PNG that announces millions of pixels is refused before it is decoded."""
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IDAT")
    with pytest.raises(InputError, match=r"a\.png"):
        data_uri(tmp_path, "a.png")


@pytest.mark.parametrize("name", ["attention/attention.json", "calibration.json", "flips/names.json"])
def test_broken_records_are_errors(tmp_path: Path, name: str) -> None:
    """A record beside the report that is not what it should be is named, not passed over."""
    thumbnails.write(flipped(2), [pixels(tmp_path)], tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('{"schema": "x"')
    with pytest.raises(InputError, match=Path(name).name):
        report_files.render(flipped(2), "html", tmp_path)


def test_clipping_is_told() -> None:
    """Bins wholly outside the chosen range count as clipped, those it cuts do not."""
    layer = LayerHistogram("fc1", -1.0, 2.0, first=-3.0, width=1.0, counts=(1, 2, 3, 10, 10, 4))
    assert layer.clipped == pytest.approx(7 / 30)
    found = CalibrationRecord("percentile", (224, 224), 8, (layer,))
    legend, folded = calibration_html.parts([found])
    assert "percentile chose" in (legend.text or "")
    drawing = folded.find(".//svg")
    assert drawing is not None and "23 % clipped" in str(drawing.get("aria-label"))


def test_unavailable_attention_says_why(tmp_path: Path) -> None:
    """A layer without a map and a model without rollout are told in words."""
    layer = AttentionLayer(name="a.0", heads=2, queries=49, keys=49, query="-", reason="padded windows")
    image = AttentionImage(name="x", image_size=(8, 8), layers=(layer,), rollout_reason="needs all tokens")
    (tmp_path / "attention").mkdir()
    found = AttentionFile(model="m", int8="not shown: no --calib", images=(image,))
    (tmp_path / "attention" / "attention.json").write_bytes(attention_file.encode(found))
    page = report_html.render(report(), tmp_path).decode()
    assert "not available: padded windows" in page
    assert "rollout not available: needs all tokens" in page and "<img" not in page


def test_colours_and_changes() -> None:
    """The largest weight has the last colour; a small change is enlarged and the sheet has three rows."""
    assert heat(np.float32([0, 1])).tolist() == [[0, 0, 4], [252, 255, 164]]
    one = np.float32([[0.5, 0.25]])
    assert magnification([Column("a", one, one + np.float32(0.01))]) == 50
    assert magnification([Column("a", one, one)]) == 1000 and magnification([Column("a", one, None)]) == 1
    grey = np.full((10, 20, 3), 128, np.uint8)
    alone = sheet(grey, [Column("a", one, None)])
    both = sheet(grey, [Column("a", one, one[:, ::-1])])
    assert both.width == alone.width and both.height - 18 == 3 * (alone.height - 18)
