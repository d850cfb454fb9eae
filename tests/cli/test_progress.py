"""Progress: counts and time left for who watches, lines for --verbose, nothing in a pipe."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from vit_export.terminal import progress_display


def shown(terminal: bool, *, quiet: bool = False) -> str:
    """What a console of 80 columns is given while 128 images are calibrated."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=80, color_system=None, legacy_windows=False)
    with progress_display(console, quiet) as notify:
        notify("trace", 0, 1)
        for done in range(0, 129, 16):
            notify("calibrate", done, 128)
        notify("download timm:vit", 0, 1)
        notify("evaluate onnx int8", 499, 500)
    return out.getvalue()


def test_a_terminal_sees_counts_and_time_left() -> None:
    """A stage with steps shows how many are done and how long the rest takes; one without shows its name."""
    text = shown(True)
    assert "evaluate onnx int8" in text and "499/500" in text and "left" in text
    assert "trace" in text and " 0/1 " not in text


@pytest.mark.parametrize("quiet", [False, True])
def test_a_pipe_and_quiet_see_nothing(quiet: bool) -> None:
    """Nothing is written where no terminal watches, or where --quiet was asked for."""
    assert shown(quiet, quiet=quiet) == ""


def test_verbose_leaves_a_line_a_stage(capfd: pytest.CaptureFixture[str]) -> None:
    """--verbose writes each ended stage with its time and steps to stderr, in a pipe too."""
    console = Console(file=io.StringIO(), force_terminal=False)
    with progress_display(console, quiet=False, verbose=True) as notify:
        notify("trace", 0, 1)
        notify("calibrate", 0, 128)
        notify("calibrate", 128, 128)
    out, err = capfd.readouterr()
    first, second = err.splitlines()
    assert first.startswith("trace: ") and first.endswith(" s")
    assert second.startswith("calibrate: ") and second.endswith(" s, 128 steps") and not out
