"""What the pages hold, without a browser."""

from __future__ import annotations

import importlib.util
import sys
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.sample_report import IMAGES, latency, report, result
from vit_export import cli
from vit_export.errors import InputError
from vit_export.runtime import comparison, report_files, report_html
from vit_export.runtime.flips import Flip, confusion, flips
from vit_export.runtime.html_charts import WITHOUT, _ticks
from vit_export.runtime.html_figures import error_shares, of_report
from vit_export.runtime.report_schema import PackedIds, Report, StageLoss


class Text(HTMLParser):
    """The tags and the text of a page, as a browser would take them."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(page.decode())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data


def spec(report: Report, text: str) -> Report:
    return msgspec.structs.replace(report, model=msgspec.structs.replace(report.model, spec=text))


@settings(max_examples=40, deadline=None)
@given(st.text())
def test_no_name_changes_the_pages_structure(text):
    """Whatever a model is called, the page has the same elements."""
    plain = report(result(status="not_run", reason="no GPU", latency_ms=None, top1=None, top1_drop=None))
    assert Text(report_html.render(spec(plain, text))).tags == Text(report_html.render(plain)).tags


def test_page_is_whole_without_pygal(monkeypatch):
    """On a base install all words and tables are there and the page says how to get charts."""
    charted = Text(report_html.render(report()))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pygal" else find(name))
    monkeypatch.setitem(sys.modules, "pygal", None)
    bare = Text(report_html.render(report()))
    assert WITHOUT in bare.text and "svg" not in bare.tags
    assert bare.tags.count("table") == charted.tags.count("table") > 0
    assert "needs an NVIDIA GPU and driver" in bare.text


def test_empty_and_unmeasured_reports_have_no_empty_charts():
    """A report without results, or with nothing that ran, draws what it has and says the rest in words."""
    lost = result(status="failed", reason="SIGSEGV", latency_ms=None, top1=None, top1_drop=None)
    bare = report(lost)
    assert [figure[0][0].text for figure in of_report(bare)] == ["Latency"]  # of the baseline
    none = msgspec.structs.replace(bare, results=())
    assert "No artifact was asked for." in Text(report_html.render(none)).text


def test_flips_say_which_image_went_where():
    """Flips are the images whose class differs, told as lost, gained or wrong both times by their labels."""
    labels = np.arange(IMAGES) % 10
    before, after = labels.copy(), labels.copy()
    after[4], before[15], before[27], after[27] = 9, 2, 1, 3
    base = report(result(predictions=PackedIds.pack(after)))
    one = msgspec.structs.replace(
        base, baseline=msgspec.structs.replace(base.baseline, predictions=PackedIds.pack(before))
    )
    found = flips(one, one.results[0])
    assert found == (Flip(4, 4, 9, 4), Flip(15, 2, 5, 5), Flip(27, 1, 3, 7))
    assert [flip.outcome for flip in found] == ["lost", "gained", "wrong both times"]
    assert confusion(found) == {(4, 9): 1, (2, 5): 1, (1, 3): 1}
    assert flips(base, base.results[0]) is None  # that baseline holds no predictions


def test_damaged_predictions_are_an_error():
    """A report whose packed predictions were cut short is refused, not drawn as if nothing had changed."""
    broken = PackedIds(count=IMAGES, data="AAAA")
    base = report(result(predictions=broken))
    one = msgspec.structs.replace(base, baseline=msgspec.structs.replace(base.baseline, predictions=broken))
    with pytest.raises(InputError, match="damaged"):
        report_html.render(one)


def test_error_shares_are_powers():
    """10 dB less SQNR is ten times the blame, a stage without error has none; resizing is not to blame."""
    stages = tuple(
        StageLoss(stage=name, sqnr_db=db, agreement=None)
        for name, db in (("resize", 3.0), ("quantize", 20.0), ("lower", None), ("runtime", 30.0))
    )
    assert error_shares(result(stages=stages)) == pytest.approx(
        {"quantize": 1000 / 11, "lower": 0.0, "runtime": 100 / 11}
    )
    assert error_shares(result()) == {}


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_enclose_their_values(low, span):
    """Axis ticks are evenly spaced, few, and enclose what is drawn."""
    ticks = _ticks(low, low + span)
    slack = 1e-6 * (ticks[1] - ticks[0])
    assert 2 <= len(ticks) <= 7 and ticks[0] <= low + slack and ticks[-1] >= low + span - slack
    assert np.allclose(np.diff(ticks), ticks[1] - ticks[0])


def test_several_reports_become_one_page(tmp_path, monkeypatch, capsys):
    """`report a b` prints and writes how many times faster the same artifact is, and what is missing."""
    slow, fast = report(result(latency_ms=latency(40.0))), report(
        result(latency_ms=latency(10.0)), result(target="openvino")
    )  # fmt: skip
    other = msgspec.structs.replace(fast.environment, cpu="Another CPU")
    write(tmp_path / "slow", slow)
    write(tmp_path / "fast", msgspec.structs.replace(fast, environment=other))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["vit-export", "report", "slow", "fast/report.json"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out = capsys.readouterr().out
    table = [line for line in out.splitlines() if not line.startswith(("1: ", "2: "))]
    assert not stop.value.code and max(map(len, table)) <= 80
    page = Text((tmp_path / "comparison.html").read_bytes())
    for text in (out, page.text):
        assert "4.00x" in text and "not in this run" in text
        assert "2: fast/report.json against 1: slow: another processor" in text
    assert page.tags.count("svg") == 2


def test_like_runs_raise_no_doubts():
    """Two runs on the same machine, images and model are compared without a warning."""
    runs = (comparison.Run("1: a", report()), comparison.Run("2: b", report()))
    assert list(comparison.doubts(runs)) == []


def write(folder: Path, data: Report) -> None:
    folder.mkdir()
    report_files.write(data, folder, ["json"])
