"""Kill -9, Ctrl-C and a full disk: artifacts are whole or absent, and the next run goes on from there."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("export_once.py")
ARGUMENTS = (
    "--target", "onnx", "--target", "openvino", "--int8", "--calib-method", "minmax", "--eval-size", "16",
    "--calib-size", "8", "--threads", "1", "--no-bundle", "--quiet",
)  # fmt: skip
TIMES = (
    "latency_ms", "speedup", "speedup_vs_fp16", "roofline", "peak_rss_bytes", "verdict", "verdict_reason",
    "gates",
)  # fmt: skip


def command(output: Path, moment: int | str = 0, action: str = "kill") -> list[str]:
    return [sys.executable, str(SCRIPT), str(moment), action, *ARGUMENTS, "--output", str(output)]


def run(
    output: Path, moment: int | str = 0, action: str = "kill", *more: str
) -> subprocess.CompletedProcess[str]:
    """One export, which dies at a moment unless that is 0; pytest's own limit ends one that hangs."""
    line = [*command(output, moment, action), *more]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}  # a first import's files are no events
    return subprocess.run(line, capture_output=True, text=True, check=False, env=environment)


def artifacts(output: Path) -> dict[str, str]:
    """SHA-256 of every file of a target, and of the plan, by its path."""
    files = [*output.glob("plan.json"), *(p for t in ("onnx", "openvino") for p in (output / t).rglob("*"))]
    return {
        path.relative_to(output).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(output).parts)
    }


def rows(output: Path) -> list[dict[str, Any]]:
    """The results of a report, without what was timed."""
    results: list[dict[str, Any]] = json.loads((output / "report.json").read_text())["results"]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in results]


def hidden(output: Path) -> list[str]:
    return [path.name for path in output.rglob("*") if path.name.startswith(".")]


@dataclass(frozen=True)
class Whole:
    """An undisturbed export: its folder, how many events it had and how many seconds it took."""

    output: Path
    events: int
    seconds: float


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVENTS", str(folder / "events"))
        began = time.monotonic()
        done = run(folder / "out")
    assert done.returncode == 0, done.stderr
    assert not hidden(folder / "out")
    return Whole(folder / "out", int((folder / "events").read_text()), time.monotonic() - began)


def check_resumed(whole: Whole, output: Path) -> None:
    """What the dead run left is whole; the next run makes the rest, and nothing differs in the end."""
    expected = artifacts(whole.output)
    left = artifacts(output) if output.exists() else {}
    assert left.items() <= expected.items()
    done = run(output)
    assert done.returncode == 0, done.stderr
    assert artifacts(output) == expected
    assert rows(output) == rows(whole.output)
    assert not hidden(output)


def test_killed_again_and_again(whole: Whole, tmp_path: Path) -> None:
    """SIGKILL at random file system events, each run going on where the one before died: the same in the end.

    The last kill is while the report is written: then nothing is left to be made.
    """
    output, dice = tmp_path / "out", random.Random(1)
    for event in (dice.randint(1, whole.events), dice.randint(1, whole.events)):
        assert run(output, event).returncode in (-signal.SIGKILL, 0)  # 0: a shorter run, much was done before
        assert artifacts(output).items() <= artifacts(whole.output).items()
    if not (output / "report.json").exists():
        assert run(output, "report.json").returncode == -signal.SIGKILL
        assert artifacts(output) == artifacts(whole.output)
    check_resumed(whole, output)
    reused = json.loads((output / "report.json").read_text())["reused"]
    assert {"eval images", "calibrate", "build onnx int8", "build openvino int8"} <= set(reused)
    assert {"evaluate pytorch", "evaluate openvino int8"} <= set(reused)


def test_ctrl_c_then_another_process(whole: Whole, tmp_path: Path) -> None:
    """Ctrl-C ends with 130 and no scratch; a run that reuses nothing gives the same bytes (determinism)."""
    output = tmp_path / "out"
    stopped = run(output, whole.events // 2, "interrupt")
    assert stopped.returncode == 130 and "Traceback" not in stopped.stderr
    assert set(hidden(output)) <= {".cache"} or not output.exists()
    assert artifacts(output).items() <= artifacts(whole.output).items()
    done = run(output, 0, "kill", "--no-resume")
    assert done.returncode == 0, done.stderr
    assert json.loads((output / "report.json").read_text())["reused"] == []
    assert artifacts(output) == artifacts(whole.output) and rows(output) == rows(whole.output)


def test_full_disk(whole: Whole, tmp_path: Path) -> None:
    """On a full tmpfs the run says so in one line, exits with 2, and what was there before is untouched."""
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(path.stat().st_size for path in whole.output.rglob("*") if path.is_file()) + (300 << 10)
    line = " ".join(map(str, command(disk / "out")))
    script = f"mount -t tmpfs -o size={size} tmpfs {disk} && cp -r {whole.output} {disk}/out && {line}; " + (
        f"code=$?; cp -r {disk}/out {tmp_path}/after; exit $code"
    )
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"], check=False).returncode:
        pytest.skip("mounting a small tmpfs needs unshare and root")
    done = subprocess.run(["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "no space left in" in done.stderr or "cannot" in done.stderr
    assert "Traceback" not in done.stderr
    after = tmp_path / "after"
    assert artifacts(after) == artifacts(whole.output)
    assert (after / "report.json").read_bytes() == (whole.output / "report.json").read_bytes()


def killed_at(output: Path, moment: float, how: str) -> bool:
    """Whether an export was killed: at an event by its number, or by another process after some seconds."""
    if how == "event":
        code = run(output, int(moment)).returncode
    else:
        with subprocess.Popen(command(output), start_new_session=True) as process:
            with suppress(subprocess.TimeoutExpired):
                process.wait(moment)
            os.kill(process.pid, signal.SIGKILL)  # it alone: its children must notice by themselves
        code = process.returncode
    assert code in (-signal.SIGKILL, 0)  # 0: a run that goes on where another died may end earlier
    return code != 0


@pytest.mark.slow
@pytest.mark.timeout(14_400)
@pytest.mark.parametrize("how", ["event", "time"])
def test_killed_at_many_random_moments(whole: Whole, tmp_path: Path, how: str) -> None:
    """Twenty kills at random file system events, twenty at random times: each leaves whole files only.

    Up to four in a row before a run may end, which then gives the bytes and rows of an undisturbed one.
    """
    dice, kills, output = random.Random(100), 0, tmp_path / "out"
    longest = whole.events if how == "event" else whole.seconds
    while kills < 20:
        died = killed_at(output, dice.uniform(0.02, 1.0) * longest, how)
        kills += died
        assert not output.exists() or artifacts(output).items() <= artifacts(whole.output).items()
        if not died or kills % 4 == 0:
            check_resumed(whole, output)
            shutil.rmtree(output)
