"""One run at a time in an output folder, and a full disk named as such."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vit_export.errors import RunnerError, UsageError
from vit_export.workspace import is_full, workspace

HOLD = """
import sys, time
from pathlib import Path
from vit_export.workspace import workspace
with workspace(Path(sys.argv[1])) as work:
    (work / "half").write_text("x")
    print("held", flush=True)
    time.sleep(600)
"""


def _holder(output: Path) -> subprocess.Popen[str]:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(output)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    return holder


def test_two_runs_do_not_share_an_output(tmp_path: Path) -> None:
    """The second run is refused with the first one's process id; killed, the first lets go at once."""
    output = tmp_path / "out"
    holder = _holder(output)
    try:
        with (
            pytest.raises(UsageError, match=rf"process {holder.pid} on .* since \d{{4}}-"),
            workspace(output),
        ):
            pass
        assert list(output.glob(".work-*/half"))  # the refused run touched nothing
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    with workspace(output) as work:
        assert [path.name for path in output.glob(".work-*")] == [work.name]  # the dead run's scratch is gone
    assert not output.exists()


def test_what_a_killed_run_left_is_cleared_and_the_rest_is_not(tmp_path: Path) -> None:
    """Temporary names go, artifacts and the cache of finished stages stay."""
    left = [".work-x/a", "onnx/int8/.96x96.y.part/model.onnx", ".report.json.z.part"]
    kept = ["onnx/int8/96x96/model.onnx", ".cache/stages/k.json", "report.json"]
    for name in (*left, *kept):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    with workspace(tmp_path):
        pass
    files = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert files == set(kept)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RunnerError(f"OSError: [Errno 28] {os.strerror(errno.ENOSPC)}"),
    ],
)
def test_a_full_disk_is_named(tmp_path: Path, error: Exception) -> None:
    """However a library words it, also as the cause of another error: the disk is said to be full."""
    with pytest.raises(UsageError, match="no space left in"), workspace(tmp_path):
        raise RuntimeError("PytorchStreamWriter failed") from error
    assert not list(tmp_path.glob(".work-*"))


def test_other_errors_pass(tmp_path: Path) -> None:
    """An error with room on the disk is what it was."""
    assert not is_full(tmp_path, RunnerError("refused"))
    with pytest.raises(RunnerError, match="refused"), workspace(tmp_path):
        raise RunnerError("refused")
