"""Fuzz everything that reads a file from elsewhere, each reader in processes of its own.

    python benchmarks/fuzz.py --minutes 10 [--only onnx --only npz] [--seed 0] [--keep FOLDER]

A finding is a file that made a reader raise what is not one of our errors, hang, crash its process, write
beside its file, or take more than --memory MiB. It is kept in FOLDER with the traceback. Exit code 1 if
there is any. The readers and mutations are those of tests/contracts/fuzzing.py.
"""

from __future__ import annotations

import argparse
import collections
import random
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from contracts.fuzzing import READERS, outcome  # noqa: E402

_SLICE = 20.0  # seconds a process fuzzes one reader before the next has its turn


def child(name: str, seed: int, seconds: float, keep: Path, memory: int) -> None:
    """Fuzz one reader; prints counts of outcomes. The file at hand is on disk before it is read."""
    resource.setrlimit(resource.RLIMIT_AS, (memory << 20, memory << 20))
    reader, rng = READERS[name], random.Random(seed)
    counts: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        seeds = reader.seeds(Path(scratch) / "seeds")
        outcome(
            reader, _write(Path(scratch) / f"honest{reader.suffix}", seeds[0])
        )  # imports, outside the limit
        home = Path(scratch) / "home"
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            data = reader.mutate(rng, rng.choice(seeds))
            current = _write(keep / f"{name}-{seed}{reader.suffix}.current", data)
            home.mkdir()
            path = _write(home / f"x{reader.suffix}", data)
            try:
                counts[outcome(reader, path)] += 1
                left = [p.name for p in home.iterdir() if p.stem != "x"]
                assert not left, f"wrote {left}"
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                counts["FINDING"] += 1
                _keep(keep, name, data, reader.suffix, traceback.format_exc())
            for file in home.iterdir():
                file.unlink()
            home.rmdir()
            current.unlink()
    print(dict(counts))


def _write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _keep(keep: Path, name: str, data: bytes, suffix: str, words: str) -> None:
    """One file a kind of finding: the same last line twice is one."""
    kind = "".join(c if c.isalnum() else "-" for c in words.strip().splitlines()[-1])[:80]
    (keep / f"{name}-{kind}{suffix}").write_bytes(data)
    (keep / f"{name}-{kind}.txt").write_text(words)


def main() -> int:
    """Give every reader its turns until the time is up, then print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--only", action="append", choices=list(READERS))
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"))
    parser.add_argument("--memory", type=int, default=12_000, help="MiB of address space a process may take")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.keep.mkdir(parents=True, exist_ok=True)
    if given.child:
        child(given.child, given.seed, given.minutes * 60, given.keep, given.memory)
        return 0
    names, seed = given.only or list(READERS), given.seed
    totals: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in names}
    end = time.monotonic() + given.minutes * 60
    while time.monotonic() < end:
        for name in names:
            left = min(_SLICE, end - time.monotonic())
            if left > 0:
                totals[name] += _turn(name, seed, left, given)
        seed += 1
    for name, counts in totals.items():
        print(f"{name:12} {counts.total():8} files  {dict(counts.most_common())}")
    print(f"seed {given.seed}, {sum(c.total() for c in totals.values())} files, findings in {given.keep}")
    return int(any(counts["FINDING"] or counts["CRASH"] for counts in totals.values()))


def _turn(name: str, seed: int, seconds: float, given: argparse.Namespace) -> collections.Counter[str]:
    command = [
        sys.executable, __file__, "--child", name, "--seed", str(seed), "--minutes", str(seconds / 60),
        "--keep", str(given.keep), "--memory", str(given.memory),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return collections.Counter(eval(lines[-1], {"__builtins__": {}}))  # our own child's dict
    print(f"{name}: its process ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    for current in given.keep.glob(f"{name}-{seed}*.current"):
        current.rename(current.with_suffix(".crash"))
    return collections.Counter(CRASH=1)


if __name__ == "__main__":
    sys.exit(main())
