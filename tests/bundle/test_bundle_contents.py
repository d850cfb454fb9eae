"""What a bundle holds, that it is always the same, and that it costs no second copy of the artifacts."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from contracts.bundles import CONTRACT, IMAGES, fake_bundle, fake_export
from contracts.sample_report import result
from vit_export.artifacts import Runnable
from vit_export.errors import InputError
from vit_export.runtime import bundle_manifest
from vit_export.runtime.bundle import subset, write_bundle
from vit_export.runtime.bundle_open import open_bundle


def test_every_file_is_listed_with_its_hash(tmp_path: Path) -> None:
    """The manifest names exactly the files that are there, with size and SHA-256."""
    folder = fake_bundle(tmp_path / "out")
    manifest = bundle_manifest.decode((folder / "manifest.json").read_bytes(), "test")
    there = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    assert there.keys() == {file.path for file in manifest.files} | {"manifest.json"}
    for file in manifest.files:
        data = there[file.path].read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file.bytes, file.sha256)
    assert manifest.plans == ("plan.json",)
    assert manifest.versions
    assert manifest.sizes[0].preprocessing == CONTRACT


def test_golden_and_evaluation_images_carry_fp32_outputs(tmp_path: Path) -> None:
    """Sixteen golden images and the asked subset, uint8 with the baseline's logits, spread over all."""
    whole, size = fake_export(tmp_path / "out")
    write_bundle(whole, [size], tmp_path / "out", images=25)
    bundle = open_bundle(tmp_path / "out" / "bundle", tmp_path)
    stored = bundle.manifest.sizes[0]
    assert (stored.golden.images, stored.evaluation.images) == (16, 25)
    pixels, logits = np.load(size.images.pixels), size.logits
    rows = np.arange(25) * IMAGES // 25
    assert np.array_equal(np.load(bundle.images(stored.evaluation, CONTRACT).pixels), pixels[rows])
    assert np.array_equal(bundle.logits(stored.evaluation), logits[rows])
    assert np.array_equal(bundle.labels(stored.evaluation), size.images.labels[rows])
    golden = rows[np.arange(16) * 25 // 16]
    assert np.array_equal(np.load(bundle.images(stored.golden, CONTRACT).pixels), pixels[golden])


def test_the_same_export_gives_the_same_bytes(tmp_path: Path) -> None:
    """Two bundles of one export are one file, byte for byte, whatever the time and the folder."""
    first = fake_bundle(tmp_path / "a" / "out", zipped=True)
    os.utime(first, (0, 0))
    second = fake_bundle(tmp_path / "b" / "elsewhere", zipped=True)
    assert first.read_bytes() == second.read_bytes()


def test_a_subset_is_a_bundle_of_what_was_chosen(tmp_path: Path) -> None:
    """--target sends a host these artifacts, their images and the plan, and nothing of the others."""
    whole, size = fake_export(tmp_path / "out")
    other = tmp_path / "out/openvino/int8/32x32/model.xml"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"<net/>")
    second = result(target="openvino", image_size=(32, 32), artifact="openvino/int8/32x32/model.xml")
    runnable = Runnable("fake", other)
    size = replace(size, runnables={**size.runnables, second.name: runnable})
    whole = msgspec.structs.replace(whole, results=(*whole.results, second))
    bundle = open_bundle(write_bundle(whole, [size], tmp_path / "out"), tmp_path)
    assert subset(bundle, bundle.manifest.artifacts, tmp_path / "same") is bundle
    made = subset(bundle, bundle.manifest.artifacts[1:], tmp_path / "some")
    assert open_bundle(tmp_path / "some", tmp_path) == made
    assert [artifact.target for artifact in made.manifest.artifacts] == ["openvino"]
    gone = {f.path for f in bundle.manifest.files} - {f.path for f in made.manifest.files}
    assert gone == {"onnx/int8/32x32/model.onnx"}


def test_artifacts_are_linked_not_copied(tmp_path: Path) -> None:
    """The bundle's artifact is the exported file itself, so a bundle does not double the disk used."""
    folder = fake_bundle(tmp_path / "out")
    assert (folder / "onnx/int8/32x32/model.onnx").samefile(tmp_path / "out/onnx/int8/32x32/model.onnx")


def test_artifacts_are_copied_where_links_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system without hard links the bundle is the same, made of copies."""

    def refuse(*_: object) -> None:
        raise OSError("Operation not supported")

    linked = fake_bundle(tmp_path / "a" / "out", zipped=True).read_bytes()
    monkeypatch.setattr(os, "link", refuse)
    folder = fake_bundle(tmp_path / "b" / "out", zipped=True)
    assert folder.read_bytes() == linked


def test_a_whole_set_keeps_its_digest_a_subset_gets_its_own(tmp_path: Path) -> None:
    """`gate` pairs a device's report with the export's only when both saw the same images."""
    all_of_it = open_bundle(fake_bundle(tmp_path / "a" / "out"), tmp_path).manifest.evaluation
    some = open_bundle(fake_bundle(tmp_path / "b" / "out", images=20), tmp_path).manifest.evaluation
    assert all_of_it.sha256 == "1" * 64
    assert some.sha256 != "1" * 64
    assert all_of_it.path == "eval"  # not where it was on the exporting machine


def test_a_failed_write_leaves_the_old_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle is replaced whole or not at all."""
    whole, size = fake_export(tmp_path / "out")
    folder = write_bundle(whole, [size], tmp_path / "out")
    before = (folder / "manifest.json").read_bytes()
    monkeypatch.setattr(bundle_manifest, "encode", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_bundle(whole, [size], tmp_path / "out", images=20)
    assert (folder / "manifest.json").read_bytes() == before
    assert not list((tmp_path / "out").glob(".bundle*"))


def test_truncated_array_is_an_input_error(tmp_path: Path) -> None:
    """An array that is not what its manifest says is told as such, not by numpy."""
    bundle = open_bundle(fake_bundle(tmp_path / "out"), tmp_path)
    stored = bundle.manifest.sizes[0].evaluation
    bundle.path(stored.logits).write_bytes(b"\x93NUMPY")
    with pytest.raises(InputError, match=r"logits\.npy"):
        bundle.logits(stored)
