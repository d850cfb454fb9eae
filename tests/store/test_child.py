"""A build step in a process of its own: its crash, hang or greed is one TargetError."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vit_export.artifacts import Preprocessing
from vit_export.errors import MissingExtra, TargetError, UnsupportedOperator
from vit_export.export.child import in_child

HERE = str(Path(__file__).parent)


@pytest.fixture(autouse=True)
def steps(monkeypatch: pytest.MonkeyPatch) -> object:
    """The module of steps, importable here and in children."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (HERE, os.environ.get("PYTHONPATH")))))
    monkeypatch.syspath_prepend(HERE)
    import steps

    return steps


def test_values_keep_their_types(steps: object) -> None:
    """Paths, dataclasses and tuples arrive as such on both sides."""
    step = in_child(steps.typed, timeout=60, what="a step")  # type: ignore[attr-defined]
    contract = Preprocessing((8, 16))
    assert step(Path("/a/b.onnx"), contract, names=("x", "y")) == {"b.onnx x y": contract}


def test_a_child_does_not_import_torch(steps: object) -> None:
    """A step pays for its own SDK only."""
    assert in_child(steps.heavy, timeout=60, what="a step")() == []  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("step", "kind", "words"),
    [
        ("crash", TargetError, ["the test step died with SIGSEGV", "last words: vendor: about to fail"]),
        ("out_of_memory", TargetError, ["not enough memory"]),
        ("refuse", UnsupportedOperator, ["no Erf of blocks.0", "use another opset"]),
        ("missing", MissingExtra, ["pip install 'vit-export[openvino]'"]),
        ("bug", TargetError, ["ZeroDivisionError: in the vendor's code"]),
    ],
)
def test_what_goes_wrong_is_said(steps: object, step: str, kind: type[Exception], words: list[str]) -> None:
    """A crash, no memory, a refusal, a missing package and a bug each reach the parent as their own error."""
    with pytest.raises(kind) as caught:
        in_child(getattr(steps, step), timeout=60, what="the test step")()
    for word in words:
        assert word in str(caught.value)


def test_a_hang_is_ended(steps: object) -> None:
    """A step that does not end within its time is killed and says how to give it more."""
    with pytest.raises(TargetError, match=r"did not end within 0\.5 s\n  give it more with --timeout"):
        in_child(steps.hang, timeout=0.5, what="the test step")()  # type: ignore[attr-defined]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_parent_leaves_no_child(tmp_path: Path) -> None:
    """The child ends when its parent is killed with SIGKILL."""
    code = (
        "import sys; from pathlib import Path; from vit_export.export.child import in_child; import steps\n"
        "in_child(steps.pid_then_wait, timeout=60, what='x')(Path(sys.argv[1]))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "pid")])
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    child = Path("/proc", (tmp_path / "pid").read_text())
    while child.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not child.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_a_step_left_running_is_ended(steps: object, tmp_path: Path) -> None:
    """A process that a library forked does not outlive the step."""
    in_child(steps.leave_a_helper, timeout=60, what="a step")(tmp_path / "pid")  # type: ignore[attr-defined]
    helper, deadline = Path("/proc", (tmp_path / "pid").read_text(), "stat"), time.monotonic() + 60
    while helper.exists() and helper.read_text().rpartition(") ")[2][0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)
