"""Atomic writes: complete or absent."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from vit_export.errors import UsageError
from vit_export.python310 import sha256_of
from vit_export.runtime.files import atomic_directory, size_bytes, write_atomic


def test_write_makes_folders_and_leaves_no_other_file(tmp_path: Path):
    """A file arrives with its content, as an ordinary file, and nothing else stays in its folder."""
    path = tmp_path / "a" / "b.json"
    write_atomic(path, b"one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(path.parent.iterdir()) == [path]
    if os.name == "posix":
        mask = os.umask(0)
        os.umask(mask)
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """When the disk fills up, the error says so, the old file is whole and no part of the new one stays."""
    path = tmp_path / "report.json"
    write_atomic(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match="No space left") as caught:
        write_atomic(path, b"new")
    assert caught.value.exit_code == 2
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_in_the_way_of_a_folder_is_one_clear_error(tmp_path: Path):
    """An output path below a file is refused with the path, whoever runs it (root ignores modes)."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"report\.json"):
        write_atomic(tmp_path / "file" / "report.json", b"")
    with pytest.raises(UsageError, match="out"), atomic_directory(tmp_path / "file" / "out"):
        pass


@pytest.mark.parametrize("before", [False, True])
def test_directory_appears_whole_or_not_at_all(tmp_path: Path, before: bool):
    """A folder shows up when its block ends well; after an exception the old one is untouched."""
    path = tmp_path / "out"
    if before:
        path.mkdir()
        (path / "old").write_text("old")
    with pytest.raises(RuntimeError), atomic_directory(path) as part:
        (part / "half").write_text("")
        raise RuntimeError
    assert [p.name for p in tmp_path.rglob("*")] == (["out", "old"] if before else [])
    with atomic_directory(path) as part:
        (part / "new").write_text("new")
        assert not (path / "new").exists()
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["new", "out"]


def test_hash_and_size(tmp_path: Path):
    """The hash is SHA-256 of all bytes, more than one read of them; sizes add up over a folder."""
    data = os.urandom((1 << 20) + 7)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a").write_bytes(data)
    (tmp_path / "b").write_bytes(b"12345")
    assert sha256_of(tmp_path / "sub" / "a") == hashlib.sha256(data).hexdigest()
    assert size_bytes(tmp_path / "b") == 5
    assert size_bytes(tmp_path) == len(data) + 5
