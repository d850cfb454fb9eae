"""The terminal's tables: 80 columns, nothing cut, no markup from elsewhere, NO_COLOR."""

from __future__ import annotations

import io

import msgspec
import pytest
from rich.cells import cell_len

from contracts.sample_report import latency, report, result
from vit_export.artifacts import Precision
from vit_export.runtime import report_html, report_markdown
from vit_export.runtime.console import gate_table, make_console, plain_table, print_report
from vit_export.runtime.gate import gate
from vit_export.runtime.report_cells import HEADERS, milliseconds, number, printable, rows
from vit_export.runtime.report_schema import Data
from vit_export.runtime.sweep import sweep


def printed(made, monkeypatch: pytest.MonkeyPatch, **env: str) -> str:
    """What `print_report` writes with these environment variables, at 80 columns unless they say else."""
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"COLUMNS": "80"} | env).items():
        monkeypatch.setenv(name, value)
    out = io.StringIO()
    print_report(made, make_console(out))
    return out.getvalue()


WIDE = report(
    result(
        target="tensorrt", precision=Precision.FP16, image_size=(1022, 1022), bytes=1_234_567_890,
        latency_ms=latency(12345.6, unstable=True), speedup=123.456, top1_drop=-12.5,
        top1_drop_ci95=(-20.25, -10.75), sqnr_db=-10.5,
    )
)  # fmt: skip


@pytest.mark.parametrize("made", [report(), WIDE], ids=["every-kind", "wide-numbers"])
def test_fits_eighty_columns_and_cuts_nothing(made, monkeypatch: pytest.MonkeyPatch):
    """No line is wider than 80 cells, and every number of every row is there whole."""
    text = printed(made, monkeypatch)
    assert max(cell_len(line) for line in text.splitlines()) <= 80
    assert "…" not in text
    for row in rows(made):
        for cell in row.cells[1:]:
            for word in cell.split(" ["):
                assert word.rstrip("]") in text


def test_baseline_comes_first_then_its_artifacts(monkeypatch: pytest.MonkeyPatch):
    """The first row is FP32 PyTorch, and each verdict follows with its reason in words."""
    lines = printed(report(), monkeypatch).splitlines()
    assert lines[0].split() == list(" ".join(HEADERS).split())
    assert lines[2].startswith("pytorch fp32")
    assert "  int8 is 0.93x the speed of fp16 here" in (line.rstrip() for line in lines)


def test_no_color_and_forced_color(monkeypatch: pytest.MonkeyPatch):
    """Colour only where it is wanted: never with NO_COLOR, never in a pipe, on request otherwise."""
    assert "\x1b[3" not in printed(report(), monkeypatch)
    assert "\x1b[32m" in printed(report(), monkeypatch, FORCE_COLOR="1", TERM="xterm")
    assert "\x1b[3" not in printed(report(), monkeypatch, FORCE_COLOR="1", NO_COLOR="1", TERM="xterm")


def test_vendor_text_cannot_style_the_terminal(monkeypatch: pytest.MonkeyPatch):
    """Escape sequences and rich markup in a message are shown as text or dropped."""
    failed = result(status="failed", reason="\x1b[2J[bold]boom[/bold] :smile: \x07")
    text = printed(report(failed), monkeypatch)
    assert "\x1b" not in text
    assert "[bold]boom[/bold] :smile:" in text


def test_printable_keeps_text():
    """Letters of any language stay; escapes and control characters go."""
    assert printable("é 图 \x1b[1;31mred\x1b[0m\x00\x9b\ttab") == "é 图 red\ttab"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0421, "0.0421"), (3.14159, "3.14"), (31.41, "31.4"), (314.2, "314"), (99.96, "100"), (None, "-")],
)
def test_three_digits(value: float | None, text: str):
    """Times and sizes have about three significant digits and no exponent."""
    assert milliseconds(value) == text


def test_no_negative_zero():
    """A drop of -0.04 points prints as 0.0."""
    assert [number(v, ".1f") for v in (-0.04, 0.0, -0.06, None)] == ["0.0", "0.0", "-0.1", "-"]


def test_gate_table_fits(monkeypatch: pytest.MonkeyPatch):
    """The gate's checks fit 80 columns, with rules as conditions and not as HTML."""
    monkeypatch.setenv("COLUMNS", "80")
    out = io.StringIO()
    make_console(out).print(gate_table(gate(report(), report()).checks))
    assert max(cell_len(line) for line in out.getvalue().splitlines()) <= 80
    assert "<= 1" in out.getvalue()
    assert "inconclusive" in out.getvalue()


def test_plain_table_lists_text(monkeypatch: pytest.MonkeyPatch):
    """`models` and `doctor` print lists that wrap inside their columns, title first."""
    monkeypatch.setenv("COLUMNS", "80")
    out = io.StringIO()
    make_console(out).print(plain_table(("name", "what"), [("digits-vit", "word " * 40)], title="models"))
    lines = out.getvalue().splitlines()
    assert lines[0].strip() == "models"
    assert max(map(len, lines)) <= 80
    assert out.getvalue().count("word") == 40


def test_notes_are_whole_lines_and_said_once(monkeypatch: pytest.MonkeyPatch):
    """A command to copy is not broken; what is said of several artifacts comes once, in every format."""
    command = "with TensorRT 10: trtexec " + " ".join(f"--option{i}=value" for i in range(20))
    made = report(
        result(notes=("its own \x1b[31mwarning",)),
        result(target="tensorrt", notes=(command,)),
        result(target="tensorrt", precision=Precision.FP16, notes=(command,)),
    )
    lines = printed(made, monkeypatch).splitlines()
    assert lines.count(f"  {command}") == 1 and "  its own warning" in lines
    page = report_html.render(made).decode()
    assert page.count("--option19=value") == 1 and "its own warning" in page
    assert report_markdown.render(made).decode().count("--option19=value") == 2  # under each verdict


def swept():
    """Two sizes, the larger first, one artifact each and one that was not run."""
    small = {"image_size": (96, 128), "top1": 0.911, "agreement": 0.954, "latency_ms": latency(11.0)}
    baseline = report().baseline
    less = msgspec.structs.replace(baseline, image_size=(96, 128), top1=0.913, latency_ms=latency(30.0))
    not_run = {"target": "coreml", "status": "not_run", "top1": None, "latency_ms": None}
    results = (result(), result(**small), result(**small | not_run))
    return report(*results, more_baselines=(less,))


def test_accuracy_against_resolution_is_shown(monkeypatch: pytest.MonkeyPatch):
    """Each artifact from its smallest size to its largest, the baseline first, within 80 columns."""
    lines = sweep(swept())
    assert [line[:2] for line in lines] == [
        ("pytorch fp32", "96x128"), ("pytorch fp32", "224x224"),
        ("onnx int8", "96x128"), ("onnx int8", "224x224"),
    ]  # fmt: skip
    assert lines[2][2:] == ("0.911", "0.954", "11.0", "2.40x")
    text = printed(swept(), monkeypatch)
    assert max(cell_len(line) for line in text.splitlines()) <= 80
    assert "Accuracy against resolution" in text
    assert "| onnx int8 | 96x128 | 0.911 | 0.954 | 11.0 | 2.40x |" in report_markdown.render(swept()).decode()


def test_one_size_or_no_images_has_no_sweep():
    """A table of one size says nothing new, and noise has no accuracy."""
    assert sweep(report()) == ()
    assert sweep(msgspec.structs.replace(swept(), data=Data())) == ()
    assert "resolution" not in report_markdown.render(report()).decode()
