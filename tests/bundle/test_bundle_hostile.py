"""Bundles that were cut, changed or made to do harm: refused with exit code 2, and nothing written."""

from __future__ import annotations

import json
import os
import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from contracts.bundles import fake_bundle
from vit_export.errors import InputError, UntrustedInput
from vit_export.runtime import bundle_manifest, bundle_open
from vit_export.runtime.bundle_open import open_bundle

ARTIFACT = "onnx/int8/32x32/model.onnx"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An honest bundle with its zip beside it; never changed."""
    return fake_bundle(tmp_path_factory.mktemp("good") / "out", zipped=True).with_name("bundle")


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy of the honest bundle to spoil."""
    return Path(shutil.copytree(good, tmp_path / "bundle"))


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Path]:
    """The work folder; afterwards nothing may have changed around it."""
    place = tmp_path / "outside" / "work"
    place.mkdir(parents=True)
    (tmp_path / "outside" / "kept").write_text("kept")
    yield place
    assert sorted(p.name for p in (tmp_path / "outside").iterdir()) == ["kept", "work"]
    assert (tmp_path / "outside" / "kept").read_text() == "kept"
    assert not Path("/tmp/vit-export-escaped").exists()


def rewrite(good: Path, target: Path, change: Callable[[zipfile.ZipFile], None], skip: str = "") -> Path:
    """The honest zip without the member `skip`, and with what `change` adds."""
    with zipfile.ZipFile(good.with_suffix(".zip")) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            if info.filename != skip:
                new.writestr(info, old.read(info))
        change(new)
    return target


def entry(name: str, mode: int = stat.S_IFREG | 0o644) -> zipfile.ZipInfo:
    """A zip entry under a name as it is, with a Unix mode."""
    info = zipfile.ZipInfo("x")
    info.filename = info.orig_filename = name
    info.external_attr = mode << 16
    return info


def test_the_honest_bundle_opens(good: Path, work: Path) -> None:
    """The corpus is refused for what was changed: unchanged, folder, manifest, output and zip all open."""
    for path in (good, good / "manifest.json", good.parent, good.with_suffix(".zip")):
        bundle = open_bundle(path, work)
        assert bundle.path(ARTIFACT).read_bytes() == (good / ARTIFACT).read_bytes()
    assert bundle.folder == work / "bundle"


@pytest.mark.parametrize(
    "name",
    [
        "../vit-export-escaped", "../../../../../../tmp/vit-export-escaped", "/tmp/vit-export-escaped",
        "onnx/../../vit-export-escaped", "..", ".", "", "a//b", "./a", "C:/escaped", "C:\\escaped",
        "..\\escaped", "\\\\server\\share", "onnx/..", ".hidden", "onnx/.hidden", "-rf", "onnx/-o",
        "a\x00b", "a\nb", "a b", "~root", "$HOME", "`id`", "a;b", "å", "\u202egnp", "CON:", "a" * 200,
        "/".join("abcdefghijklmnop"),
    ],
)  # fmt: skip
def test_names_that_could_leave_the_folder(good: Path, tmp_path: Path, work: Path, name: str) -> None:
    """A zip entry or a manifest entry of such a name is UntrustedInput, before anything is unpacked."""
    archive = rewrite(good, tmp_path / "bad.zip", lambda new: new.writestr(entry(name), b"escaped"))
    with pytest.raises(InputError):
        open_bundle(archive, work)
    assert not any(work.iterdir())
    data = json.loads((good / "manifest.json").read_text())
    data["files"].append({"path": name, "bytes": 7, "sha256": "0" * 64})
    with pytest.raises(UntrustedInput):
        bundle_manifest.decode(json.dumps(data).encode(), "test")


@pytest.mark.parametrize("kind", ["S_IFLNK", "S_IFCHR", "S_IFBLK", "S_IFIFO", "S_IFSOCK", "S_IFDIR"])
def test_zip_entries_that_are_no_files(good: Path, tmp_path: Path, work: Path, kind: str) -> None:
    """Links and devices in a zip are refused, also under a name the manifest lists."""
    info = entry("plan.json", getattr(stat, kind) | 0o777)
    archive = rewrite(
        good, tmp_path / "bad.zip", lambda new: new.writestr(info, b"/etc/passwd"), skip="plan.json"
    )
    with pytest.raises(UntrustedInput, match="link or a device"):
        open_bundle(archive, work)
    assert not any(work.iterdir())


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["plan.json", "PLAN.json", "manifest.json", "MANIFEST.JSON"])
def test_a_name_that_is_there_twice(good: Path, tmp_path: Path, work: Path, name: str) -> None:
    """Two entries of one name, also where a file system ignores case, are refused."""
    archive = rewrite(good, tmp_path / "bad.zip", lambda new: new.writestr(entry(name), b"{}"))
    with pytest.raises(UntrustedInput, match="twice"):
        open_bundle(archive, work)


def test_decompression_bombs(good: Path, tmp_path: Path, work: Path) -> None:
    """An entry that unfolds two hundred times its size, or more than it announces, is refused unread."""

    def bomb(new: zipfile.ZipFile) -> None:
        new.writestr(entry("plan.json"), b"\0" * (50 << 20), zipfile.ZIP_DEFLATED)

    archive = rewrite(good, tmp_path / "bomb.zip", bomb, skip="plan.json")
    with pytest.raises(UntrustedInput, match="bomb"):
        open_bundle(archive, work)
    assert not any(work.iterdir())


def test_a_lying_header(good: Path, tmp_path: Path, work: Path) -> None:
    """A stream longer than its header says is cut at the announced size and refused."""
    archive = tmp_path / "lie.zip"
    size = (good / "plan.json").stat().st_size

    def long_stream(new: zipfile.ZipFile) -> None:
        new.writestr(entry("plan.json"), b"\0" * (1 << 20), zipfile.ZIP_DEFLATED)

    rewrite(good, archive, long_stream, skip="plan.json")
    data = bytearray(archive.read_bytes())
    for place in (data.rfind(b"PK\x01\x02"), data.rfind(b"PK\x03\x04")):
        offset = place + (24 if data[place + 2] == 1 else 22)
        data[offset : offset + 4] = size.to_bytes(4, "little")
    archive.write_bytes(data)
    with pytest.raises(InputError):
        open_bundle(archive, work)


def test_overlapping_entries(good: Path, tmp_path: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries that share their bytes (a zip quine's trick) hold more than the archive: refused."""
    infolist = zipfile.ZipFile.infolist

    def overlap(self: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
        found = infolist(self)
        for info in found:
            info.compress_size = 1 << 20
        return found

    monkeypatch.setattr(zipfile.ZipFile, "infolist", overlap)
    with pytest.raises(UntrustedInput, match="overlap"):
        open_bundle(good.with_suffix(".zip"), work)


def test_too_many_or_too_large(good: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts and sizes have limits, for zips and manifests alike."""
    for module in (bundle_open, bundle_manifest):
        monkeypatch.setattr(module, "MAX_FILES", 3)
    for path in (good, good.with_suffix(".zip")):
        with pytest.raises(UntrustedInput, match=r"limit is 3|more than 3|lists"):
            open_bundle(path, work)
    monkeypatch.undo()
    monkeypatch.setattr(bundle_open, "MAX_TOTAL_BYTES", 100)
    monkeypatch.setattr(bundle_manifest, "MAX_TOTAL_BYTES", 100)
    for path in (good, good.with_suffix(".zip")):
        with pytest.raises(UntrustedInput, match="more than 0 GiB"):
            open_bundle(path, work)
    monkeypatch.undo()
    monkeypatch.setattr(bundle_open, "MAX_MANIFEST_BYTES", 100)
    for path in (good, good.with_suffix(".zip")):
        with pytest.raises(UntrustedInput, match="larger than"):
            open_bundle(path, work)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.99, 0.9999])
def test_a_cut_zip(good: Path, tmp_path: Path, work: Path, share: float) -> None:
    """A zip that was not copied to its end is told as that."""
    data = good.with_suffix(".zip").read_bytes()
    (tmp_path / "cut.zip").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(InputError, match="complete zip"):
        open_bundle(tmp_path / "cut.zip", work)


def test_encrypted_zip(good: Path, tmp_path: Path, work: Path) -> None:
    """An encrypted entry is named, not tried."""
    data = bytearray(good.with_suffix(".zip").read_bytes())
    data[data.rfind(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "locked.zip").write_bytes(data)
    with pytest.raises(InputError, match="encrypted"):
        open_bundle(tmp_path / "locked.zip", work)


def _flip(folder: Path) -> None:
    data = bytearray((folder / ARTIFACT).read_bytes())
    data[-1] ^= 1
    (folder / ARTIFACT).unlink()
    (folder / ARTIFACT).write_bytes(data)


def _truncate(folder: Path) -> None:
    data = (folder / ARTIFACT).read_bytes()
    (folder / ARTIFACT).unlink()
    (folder / ARTIFACT).write_bytes(data[:-1])


def _link(folder: Path) -> None:
    (folder / "plan.json").unlink()
    (folder / "plan.json").symlink_to("/etc/passwd")


def _link_folder(folder: Path) -> None:
    shutil.move(folder / "onnx", folder.parent / "elsewhere")
    (folder / "onnx").symlink_to(folder.parent / "elsewhere")


SPOILED: dict[str, Callable[[Path], Any]] = {
    "one bit": _flip,
    "cut short": _truncate,
    "symlink": _link,
    "symlinked folder": _link_folder,
    "dangling link": lambda folder: (folder / "extra").symlink_to("nowhere"),
    "fifo": lambda folder: os.mkfifo(folder / "extra"),
    "extra file": lambda folder: (folder / "onnx/int8/32x32/model.onnx.data").write_bytes(b"more weights"),
    "missing file": lambda folder: (folder / "plan.json").unlink(),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "empty manifest": lambda folder: (folder / "manifest.json").write_bytes(b""),
    "binary manifest": lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe\x00" * 99),
    "deep manifest": lambda folder: (folder / "manifest.json").write_bytes(b"[" * 100_000),
    "option name": lambda folder: (folder / "-rf").write_bytes(b""),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_changed_folder(folder: Path, work: Path, how: str) -> None:
    """What was cut, added, linked or changed by one bit is refused; links and pipes are never followed."""
    SPOILED[how](folder)
    with pytest.raises(InputError):
        open_bundle(folder, work)


def test_finder_files_do_no_harm(folder: Path, work: Path) -> None:
    """macOS leaves .DS_Store in folders that were looked at; that is no reason to refuse a bundle."""
    (folder / ".DS_Store").write_bytes(b"Bud1")
    open_bundle(folder, work)


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another schema": lambda m: m.update(schema="vit-export.bundle/2"),
    "unknown field": lambda m: m.update(extra=1),
    "no files": lambda m: m.update(files=[]),
    "artifact outside": lambda m: m["artifacts"][0].update(path="../../etc/passwd"),
    "artifact unlisted": lambda m: m["artifacts"][0].update(path="onnx/other.onnx"),
    "target with a path": lambda m: m["artifacts"][0].update(target="../../x"),
    "unknown runner": lambda m: m["artifacts"][0].update(runner="shell"),
    "pickling runner": lambda m: m["artifacts"][0].update(runner="pytorch"),
    "another contract": lambda m: m["sizes"][0]["preprocessing"].update(mean=[0.1, 0.2, 0.3]),
    "another size": lambda m: m["artifacts"][0].update(image_size=[64, 64]),
    "negative size": lambda m: m["files"][0].update(bytes=-1),
    "huge size": lambda m: m["files"][0].update(bytes=1 << 62),
    "short hash": lambda m: m["files"][0].update(sha256="ab"),
    "pixels outside": lambda m: m["sizes"][0]["golden"].update(pixels="/etc/passwd"),
    "labels outside": lambda m: m["sizes"][0]["evaluation"].update(labels="../labels.npy"),
    "no image": lambda m: m["sizes"][0]["golden"].update(images=0),
    "plan outside": lambda m: m.update(plans=["../plan.json"]),
    "listed twice": lambda m: m["files"].append(dict(m["files"][0])),
    "listed itself": lambda m: m["files"].append({**m["files"][0], "path": "manifest.json"}),
}


@pytest.mark.parametrize("how", CHANGES)
def test_a_changed_manifest(folder: Path, work: Path, how: str) -> None:
    """A manifest that names other files, runners or contracts than it may is refused."""
    data = json.loads((folder / "manifest.json").read_text())
    CHANGES[how](data)
    (folder / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(InputError):
        open_bundle(folder, work)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_to_a_zip_is_an_error_of_ours(good: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Bytes changed anywhere give InputError, or the very same contents: never a traceback, never others."""
    original = good.with_suffix(".zip").read_bytes()
    spoiled = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        # The end holds the directory, where damage is most inventive.
        near_end = data.draw(st.booleans())
        place = data.draw(st.integers(len(spoiled) - 1500 if near_end else 0, len(spoiled) - 1))
        spoiled[place] = data.draw(st.integers(0, 255))
    (tmp_path / "spoiled.zip").write_bytes(spoiled)
    work = tmp_path / f"work-{zlib.crc32(spoiled)}"
    work.mkdir(exist_ok=True)
    try:
        bundle = open_bundle(tmp_path / "spoiled.zip", work)
        assert bundle.manifest == open_bundle(good, work).manifest
        assert bundle.path(ARTIFACT).read_bytes() == (good / ARTIFACT).read_bytes()
    except InputError:
        pass
    finally:
        shutil.rmtree(work)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_to_a_manifest_is_an_error_of_ours(good: Path, data: st.DataObject) -> None:
    """Any JSON value in the place of any other gives InputError or a manifest that is still consistent."""
    manifest = json.loads((good / "manifest.json").read_text())
    json_value = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=5,
    )
    holder = manifest
    while True:
        key = data.draw(st.sampled_from(sorted(holder) if isinstance(holder, dict) else range(len(holder))))
        if not isinstance(holder[key], dict | list) or not holder[key] or data.draw(st.booleans()):
            break
        holder = holder[key]
    holder[key] = data.draw(json_value)
    with suppress(InputError):
        bundle_manifest.decode(json.dumps(manifest).encode(), "test")
