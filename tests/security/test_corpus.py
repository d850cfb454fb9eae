"""Hundreds of damaged files for every reader: one of our errors or an honest result, never anything else."""

from __future__ import annotations

import collections
import os
import random
from pathlib import Path

import pytest

from contracts.fuzzing import READERS, Reader, deadline, outcome
from vit_export.errors import InputError

# How many damaged files each reader gets in the default run; benchmarks/fuzz.py gives it minutes of them.
FILES = {
    "manifest": 60, "bundle": 40, "report": 40, "plan": 60, "rules": 60, "config": 30, "npz": 60, "image": 80,
    "checkpoint": 60, "onnx": 40, "program": 6,
}  # fmt: skip


def test_the_corpus_is_whole() -> None:
    """Every reader has its share, and there are at least 250 files."""
    assert FILES.keys() == READERS.keys()
    assert sum(FILES.values()) >= 250


@pytest.mark.parametrize("name", READERS)
def test_damaged_files(name: str, tmp_path: Path) -> None:
    """No traceback, no hang, exit code 2 or 3, nothing written beside the file; and most are noticed."""
    reader: Reader = READERS[name]
    rng, counts = random.Random(name), collections.Counter[str]()
    seeds = reader.seeds(tmp_path / "seeds")
    for number in range(FILES[name]):
        home = tmp_path / str(number)
        home.mkdir()
        path = home / f"x{reader.suffix}"
        path.write_bytes(reader.mutate(rng, rng.choice(seeds)))
        counts[outcome(reader, path)] += 1
        assert [p.stem for p in home.iterdir()] == ["x"], number
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.isdecimal()) in ([], ["seeds"])
    if name not in ("image", "config"):  # a damaged pixel is a pixel; the config's reader always ends in 2
        assert counts["read"] < FILES[name] * 0.7, counts


@pytest.mark.parametrize("name", READERS)
def test_honest_files(name: str, tmp_path: Path) -> None:
    """The files that the damage is done to are read: what is refused above is refused for the damage."""
    reader = READERS[name]
    for number, data in enumerate(reader.seeds(tmp_path / "seeds")):
        path = tmp_path / f"{number}{reader.suffix}"
        path.write_bytes(data)
        assert outcome(reader, path) == "read"


@pytest.mark.parametrize("name", [name for name in READERS if name not in ("manifest", "image")])
def test_pipes_and_devices(name: str, tmp_path: Path) -> None:
    """What is read from elsewhere must be a file: a pipe would block, /dev/zero never ends."""
    reader = READERS[name]
    os.mkfifo(tmp_path / f"pipe{reader.suffix}")
    (tmp_path / f"zero{reader.suffix}").symlink_to("/dev/zero")
    with deadline(10):
        for path in tmp_path.iterdir():
            if name == "config":
                reader.read(path)
                continue
            with pytest.raises(InputError):
                reader.read(path)
