"""Worker processes: what happens to a crash, a hang, noise and nonsense."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vit_export.artifacts import EvalSet, Preprocessing, Runnable
from vit_export.errors import InputError, MissingExtra, RunnerError, UsageError, WorkerCrash, WorkerTimeout
from vit_export.runtime import worker_client
from vit_export.runtime.inference import predict
from vit_export.runtime.worker import serve
from vit_export.runtime.worker_client import Worker


def fake(**options: Any) -> Runnable:
    """A fake artifact."""
    return Runnable("fake", Path("fake"), threads=1, options=options)


@pytest.fixture
def data(tmp_path: Path) -> EvalSet:
    """Nine 32x32 images on disk."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    np.save(tmp_path / "pixels.npy", pixels)
    return EvalSet(tmp_path / "pixels.npy", Preprocessing((32, 32)), len(pixels))


def alive(pid: int) -> bool:
    """Whether a process with this id exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_infer_streams_and_reports_progress(data: EvalSet, tmp_path: Path):
    """Images run in batches with progress after each; only the finished file appears."""
    seen: list[tuple[str, int, int]] = []
    out = tmp_path / "logits.npy"
    with Worker(fake()) as worker:
        logits = worker.infer(data, out, batch=4, progress=lambda *step: seen.append(step))
    assert seen == [("fake", 4, 9), ("fake", 8, 9), ("fake", 9, 9)]
    assert logits.shape == (9, 10)
    assert logits.dtype == np.float32
    assert sorted(p.name for p in tmp_path.iterdir()) == ["logits.npy", "pixels.npy"]


def test_predict_tells_version_and_memory(data: EvalSet, tmp_path: Path):
    """One call gives the outputs with what the report needs: version, load time, peak memory."""
    prediction = predict(fake(), data, tmp_path / "logits.npy")
    assert prediction.version.startswith("fake ")
    assert prediction.load_seconds > 0
    assert prediction.peak_rss_bytes is None or 1e6 < prediction.peak_rss_bytes < 1e9


@pytest.mark.skipif(os.name != "posix", reason="Windows processes do not die by signal")
def test_crash_is_told_with_its_signal():
    """A segmentation fault is one error that names the signal, and it is no bug of ours (exit code 3)."""
    with (
        Worker(fake(fault="crash", fault_after=2)) as worker,
        pytest.raises(WorkerCrash, match="SIGSEGV") as e,
    ):
        worker.time(warmup=0, runs=10)
    assert e.value.signal == "SIGSEGV"
    assert e.value.exit_code == 3


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_killed_worker_hints_at_memory():
    """A worker that the system ends, as when memory runs out, is told as that."""
    with Worker(fake()) as worker:
        os.kill(worker._process.pid, signal.SIGKILL)
        with pytest.raises(WorkerCrash, match=r"SIGKILL.*memory"):
            worker.info()


def test_exit_of_the_vendor_library_is_a_crash_with_its_last_words():
    """A library that prints and calls exit() leaves its last line in the error."""
    with Worker(fake(fault="exit")) as worker, pytest.raises(WorkerCrash, match="exit code 7") as caught:
        worker.time(warmup=0, runs=1)
    assert caught.value.stderr[-1] == "fake: cannot go on"
    assert "cannot go on" in caught.value.hint


@pytest.mark.parametrize("at", ["open", "infer"])
def test_hang_ends_at_the_limit(at: str):
    """A call that does not return is ended at the timeout, and no process is left."""
    began = time.monotonic()
    worker = Worker(fake(fault="hang", fault_at=at), timeout=2)
    with pytest.raises(WorkerTimeout, match="did not answer for 2 s"), worker:
        worker.time(warmup=0, runs=1, max_seconds=0)
    assert time.monotonic() - began < 20
    assert worker._process is None


def test_missing_sdk_arrives_as_missing_extra():
    """What the runner lacks is told as in this process, with the pip command."""
    with pytest.raises(MissingExtra, match="pip install"):
        Worker(fake(fault="missing", fault_at="open")).__enter__()


@pytest.mark.parametrize(
    ("options", "error"),
    [({"fault": "error"}, RunnerError), ({"fault": "nan"}, RunnerError), ({"fault": "shape"}, RunnerError)],
)
def test_an_error_does_not_end_the_worker(options: dict[str, Any], error: type[Exception]):
    """After a reported error the same process still answers."""
    with Worker(fake(**options)) as worker:
        for _ in range(2):
            with pytest.raises(error):
                worker.time(warmup=0, runs=1)
        assert worker.info().version.startswith("fake")


def test_error_types_survive_the_pipe(data: EvalSet, tmp_path: Path):
    """An unknown option, an absent file and unfit images are each the class they are in-process."""
    with pytest.raises(UsageError, match="sped"):
        Worker(fake(sped=1)).__enter__()
    with pytest.raises(InputError, match="absent"):
        Worker(Runnable("onnx", tmp_path / "absent.onnx")).__enter__()
    with pytest.raises(UsageError, match="unknown runner"):
        Worker(Runnable("telepathy", tmp_path)).__enter__()
    wrong = EvalSet(data.pixels, Preprocessing((16, 16)), 9)
    with Worker(fake()) as worker, pytest.raises(InputError, match="uint8 NHWC"):
        worker.infer(wrong, tmp_path / "logits.npy")


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"PK\x03\x04", "pickled"])
def test_damaged_pixels_are_an_input_error(tmp_path: Path, content: bytes | str):
    """A file that is no plain array, or holds pickled objects, is refused and never unpickled."""
    path = tmp_path / "pixels.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, np.array([object()]), allow_pickle=True)
    with Worker(fake()) as worker, pytest.raises(InputError, match=r"pixels\.npy"):
        worker.infer(EvalSet(path, Preprocessing((32, 32)), 1), tmp_path / "logits.npy")


def test_vendor_prints_do_not_reach_the_protocol():
    """What a library writes to stdout lands in stderr, and answers stay readable."""
    with Worker(fake(fault="print")) as worker:
        assert len(worker.time(warmup=0, runs=3)) == 3
        worker._kill()
        assert any("garbage" in line for line in worker._stderr)


@pytest.mark.parametrize("line", ["hello\n", '{"type": "Inferred", "images": 1, "outputs": 1}\n'])
def test_nonsense_on_the_pipe_is_a_crash(monkeypatch: pytest.MonkeyPatch, line: str):
    """A worker whose answer is no message, or another message than asked for, is not trusted further."""
    popen = subprocess.Popen
    script = f"import sys; sys.stdin.readline(); print({line!r}, end='', flush=True); sys.stdin.readline()"
    monkeypatch.setattr(
        worker_client.subprocess, "Popen", lambda _, **kw: popen([sys.executable, "-c", script], **kw)
    )
    with pytest.raises(WorkerCrash, match="the fake worker"):
        Worker(fake(), timeout=20).__enter__()


def test_no_process_survives_its_block():
    """The worker is gone after a clean end and after an exception in the block."""
    with Worker(fake()) as worker:
        first = worker._process.pid
    with pytest.raises(ZeroDivisionError), Worker(fake()) as worker:
        second = worker._process.pid
        raise ZeroDivisionError
    assert not alive(first)
    assert not alive(second)
    with pytest.raises(RunnerError, match="not running"):
        worker.info()


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_killed_parent_leaves_no_worker():
    """Killed with -9, a parent takes its idle worker along, because the worker reads end of file."""
    script = (
        "from pathlib import Path; from vit_export.artifacts import Runnable\n"
        "from vit_export.runtime.worker_client import Worker\n"
        "w = Worker(Runnable('fake', Path('-'))).__enter__(); print(w._process.pid, flush=True); input()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stdin=subprocess.PIPE)
    pid = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(pid)


def test_threads_are_set_before_the_worker_starts(monkeypatch: pytest.MonkeyPatch):
    """The thread pools of OpenMP and BLAS get the runnable's number; 0 becomes the physical cores."""
    monkeypatch.setattr(worker_client, "physical_cores", lambda: 5)
    assert Worker(fake()).runnable.threads == 1
    assert Worker(Runnable("fake", Path("-"))).runnable.threads == 5
    env = worker_client.pool_environment({"OMP_NUM_THREADS": "99", "HOME": "/h"}, 5)
    assert (env["OMP_NUM_THREADS"], env["MKL_NUM_THREADS"], env["OPENBLAS_NUM_THREADS"]) == ("5", "5", "5")
    assert env["HOME"] == "/h"


def test_serve_answers_rubbish_and_work_before_open():
    """In-process: a line that is no request, and one before Open, are answered, not fatal."""
    answers: list[Any] = []
    lines = [b"rubbish\n", json.dumps({"type": "Ask"}).encode(), b'{"type": "Close"}', b"never read"]
    serve(lines, answers.append)
    assert [type(answer).__name__ for answer in answers] == ["Failed", "Failed"]
    assert "before it was told" in answers[1].message
