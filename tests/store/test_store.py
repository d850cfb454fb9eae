"""The stage store: whole entries or none, whoever writes, reads or dies."""

from __future__ import annotations

import multiprocessing
import shutil
from pathlib import Path

import numpy as np
import pytest

from vit_export import stage_keys
from vit_export.artifacts import Preprocessing
from vit_export.calibration.observers import MinMaxConfig
from vit_export.calibration.percentile import PercentileConfig
from vit_export.errors import UsageError
from vit_export.store import Key, Store

KEY = Key("build", {"program": "abc"})


def _write(folder: Path) -> object:
    (folder / "part").mkdir(parents=True, exist_ok=True)
    (folder / "model.bin").write_bytes(b"weights" * 1000)
    (folder / "part" / "empty").write_bytes(b"")
    return {"size": np.int64(7000), "path": Path("model.bin"), "names": ("a", "b")}


def _never(folder: Path) -> object:
    raise AssertionError("made again")


@pytest.fixture(params=["folder", "url"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A store in a folder, and one behind an fsspec URL."""
    return Store(tmp_path / "store" if request.param == "folder" else f"local://{tmp_path}/store")


def test_a_stage_is_made_once(store: Store, tmp_path: Path) -> None:
    """The second caller gets the same files, folders included, and the same note, without the work."""
    first, second = tmp_path / "1", tmp_path / "2"
    first.mkdir()
    second.mkdir()
    assert store.once(KEY, first, _write) == (
        {"size": 7000, "path": "model.bin", "names": ["a", "b"]}, False,
    )  # fmt: skip
    note, found = store.once(KEY, second, _never)
    assert found and note["size"] == 7000
    assert (second / "model.bin").read_bytes() == b"weights" * 1000
    assert (second / "part" / "empty").read_bytes() == b""


def test_a_failing_stage_leaves_no_entry(store: Store, tmp_path: Path) -> None:
    """What `make` raises passes through, and the next caller makes it again."""
    with pytest.raises(AssertionError):
        store.once(KEY, tmp_path, _never)
    assert store.entry(KEY) is None


@pytest.mark.parametrize("damage", [b"", b"weights" * 999, b"Weights" + b"weights" * 999])
def test_a_damaged_blob_is_made_again(tmp_path: Path, damage: bytes) -> None:
    """A file that was emptied, cut short or edited is never handed out: the stage runs again and heals it."""
    store = Store(tmp_path / "store")
    (tmp_path / "1").mkdir()
    store.once(KEY, tmp_path / "1", _write)
    (blob,) = (p for p in (tmp_path / "store/blobs").rglob("*") if p.is_file() and p.stat().st_size)
    blob.write_bytes(damage)
    (tmp_path / "2").mkdir()
    assert store.get(KEY, tmp_path / "2") is None
    assert not [p for p in (tmp_path / "2").rglob("*") if p.is_file()]
    assert store.once(KEY, tmp_path / "2", _write)[1] is False
    assert store.get(KEY, tmp_path / "2") is not None


def test_half_an_entry_is_none(tmp_path: Path) -> None:
    """An entry cut short by a file system that is not atomic counts as absent."""
    store = Store(tmp_path / "store")
    store.once(KEY, tmp_path, lambda folder: None)
    (entry,) = (tmp_path / "store/stages").iterdir()
    entry.write_bytes(entry.read_bytes()[:40])
    assert store.entry(KEY) is None


def test_copies_are_the_users_own(tmp_path: Path) -> None:
    """Without `link` a file that is edited in place leaves the store and other outputs alone."""
    store = Store(tmp_path / "store")
    for name in ("1", "2"):
        (tmp_path / name).mkdir()
        store.once(KEY, tmp_path / name, _write)
    with (tmp_path / "1/model.bin").open("r+b") as file:
        file.write(b"edited!")
    shutil.rmtree(tmp_path / "2")
    assert store.get(KEY, tmp_path / "2") is not None
    assert (tmp_path / "2/model.bin").read_bytes() == b"weights" * 1000


def _writer(root: Path, number: int) -> None:
    store, folder = Store(root), root.parent / f"writer{number}"
    folder.mkdir()
    for turn in range(20):
        store.put(KEY, folder, note=_write(folder))
        target = folder / "taken" / str(turn)
        assert store.get(KEY, target) is not None
        assert (target / "model.bin").read_bytes() == b"weights" * 1000
        shutil.rmtree(folder / "taken")


def test_writers_and_readers_do_not_disturb_each_other(tmp_path: Path) -> None:
    """Four processes write and read one key at the same time: every read is whole, nothing is left over."""
    spawn = multiprocessing.get_context("fork")
    workers = [spawn.Process(target=_writer, args=(tmp_path / "store", n)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert not list((tmp_path / "store").rglob("*.part"))


def test_a_full_or_forbidden_place_is_a_clear_error(tmp_path: Path) -> None:
    """A store that cannot be written says where and what to do."""
    (tmp_path / "store").write_text("a file")
    with pytest.raises(UsageError, match="cannot keep a finished stage"):
        Store(tmp_path / "store").put(KEY, tmp_path, None)


def test_an_unknown_url_is_a_clear_error() -> None:
    """A protocol nobody knows is the user's mistake, not a traceback."""
    with pytest.raises(UsageError, match="nosuch://"):
        Store("nosuch://bucket/store")


def test_keys_follow_content_and_nothing_else(tmp_path: Path) -> None:
    """Equal inputs give one key; another value, type, file content or array gives another."""
    first = tmp_path / "labels.txt"
    first.write_text("cat")
    second = tmp_path / "renamed.txt"
    second.write_text("cat")

    def of(**inputs: object) -> str:
        return stage_keys.key("build", **inputs).digest

    contract = Preprocessing((96, 96))
    same = {"options": {"b": 1, "a": first}, "contract": contract, "labels": np.arange(3)}
    again = {"labels": np.arange(3), "contract": Preprocessing((96, 96)), "options": {"a": second, "b": 1}}
    assert of(**same) == of(**again)
    second.write_text("dog")
    others = [
        of(**again),
        of(**{**same, "contract": contract.at((96, 97))}),
        of(**{**same, "labels": np.arange(3).astype(np.int32)}),
        of(**{**same, "observer": MinMaxConfig()}),
        of(**{**same, "observer": PercentileConfig()}),
        stage_keys.key("in torch", **same).digest,
    ]
    assert len({of(**same), *others}) == 7


def test_keys_hold_versions_and_our_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version of a library, or an edit of a module that does the work, gives another key."""
    before = stage_keys.key("pixels")
    assert before.inputs["version of numpy"] == np.__version__
    monkeypatch.setattr(stage_keys, "versions", lambda names: dict.fromkeys(names, "0"))
    assert stage_keys.key("pixels").digest != before.digest
    monkeypatch.undo()
    monkeypatch.setattr(stage_keys, "code_digest", lambda parts: "edited")
    assert stage_keys.key("pixels").digest != before.digest
