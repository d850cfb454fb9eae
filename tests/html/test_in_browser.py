"""The pages in chromium: the default model's report, one with every kind of row, and a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from selenium.webdriver.common.keys import Keys

from contracts.sample_report import IMAGES, report
from vit_export.artifacts import Decision, EvalSet, LayerPlan, LayerSensitivity, Preprocessing, QuantPlan
from vit_export.runtime import comparison, report_files, thumbnails
from vit_export.runtime.report_schema import (
    Device,
    DeviceState,
    Gate,
    PackedIds,
    Report,
    StageLoss,
)

PAGES = ("default", "every-kind", "comparison")
CHARTS = {
    "default": [
        "Latency", "Accuracy lost", "Accuracy against latency", "Which stage to blame",
        "Attention changed by int8",
    ],
    "every-kind": [
        "Latency", "Accuracy lost", "Accuracy against latency", "Which stage to blame",
        "Sensitivity by layer",
    ],
    "comparison": ["Latency", "Accuracy lost"],
}  # fmt: skip
HOSTILE = "<script>alert(1)</script><img src='http://127.0.0.1:9/x.png' onerror='alert(2)'>&amp;\"\x1b[31m"

# Each text with its colour and the first opaque colour behind it, as [text, [r, g, b], [r, g, b]].
_COLOURS = """
const rgb = c => { const m = c.match(/[\\d.]+/g).map(Number); return m[3] === 0 ? null : m.slice(0, 3); };
const behind = n => { for (; n; n = n.parentElement) { const c = rgb(getComputedStyle(n).backgroundColor);
                      if (c) return c; } return [255, 255, 255]; };
const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const text = walker.currentNode.data.trim(), node = walker.currentNode.parentElement;
  if (!text || node.closest('style')) continue;
  const style = getComputedStyle(node);
  found.push([text, rgb(node.closest('svg') ? style.fill : style.color), behind(node)]);
}
return found;
"""

# Texts of charts that reach out of their drawing, which would be cut off.
_CUT = """
return [...document.querySelectorAll('figure svg')].flatMap(svg => {
  const frame = svg.getBoundingClientRect();
  return [...svg.querySelectorAll('text')].filter(t => {
    const box = t.getBoundingClientRect();
    return box.width && (box.left < frame.left - 1 || box.right > frame.right + 1
                         || box.top < frame.top - 1 || box.bottom > frame.bottom + 1);
  }).map(t => t.textContent);
});
"""


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory, device_export: Any) -> dict[str, Path]:
    """Each page as vit-export writes it."""
    folder = tmp_path_factory.mktemp("pages")
    odd = every_kind()
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, 48, 40, 3), dtype=np.uint8)
    np.save(folder / "pixels.npy", pixels)
    names = tuple(f"<i>{i}</i>.png" for i in range(IMAGES))
    thumbnails.write(
        odd, [EvalSet(folder / "pixels.npy", Preprocessing((224, 224)), IMAGES, names=names)], folder
    )
    plan = QuantPlan("minmax", 0, 8, (LayerPlan("blocks.0.attn.qkv", False, reason="21.5 dB alone"),))
    (folder / "plan.json").write_bytes(msgspec.json.encode(plan))
    (written,) = report_files.write(odd, folder, ["html"])
    (folder / "a").mkdir()
    report_files.write(odd, folder / "a", ["json"])
    both = folder / "comparison.html"
    comparison.write(comparison.read_runs([device_export.output, folder / "a"]), both)
    return {"default": device_export.output / "report.html", "every-kind": written, "comparison": both}


def every_kind() -> Report:
    """Failed, not run, undecided, held and shipped rows, flips, kept layers, and a hostile name."""
    before = np.arange(IMAGES) % 10
    before[[3, 8, 44]] = [5, 5, 1]
    base = report()
    stages = (
        StageLoss(stage="quantize", sqnr_db=22.0, agreement=0.98),
        StageLoss(stage="lower", sqnr_db=None, agreement=1.0),
        StageLoss(stage="runtime", sqnr_db=26.0, agreement=0.99),
    )
    undecided = Gate(rule="top1_drop", value=0.2, limit=0.3, passed=None, reason="30 images are too few")
    results = [
        msgspec.structs.replace(r, stages=stages, kept_float=("blocks.0.attn.qkv",), gates=(undecided,))
        if r.status == "ok"
        else r
        for r in base.results
    ]
    return msgspec.structs.replace(
        base,
        model=msgspec.structs.replace(base.model, spec=HOSTILE, family=HOSTILE),
        command=f"vit-export --model '{HOSTILE}'",
        baseline=msgspec.structs.replace(base.baseline, predictions=PackedIds.pack(before)),
        results=tuple(results),
        decisions=(
            Decision("rounding", "gptq", True, 27.5, 0.985),
            Decision("rounding", "nearest", False),
        ),
        sensitivity=(
            LayerSensitivity("blocks.0.attn.qkv", "linear", 1_250_000, 21.5, 33.0),
            LayerSensitivity("head", "linear", 2000, 48.0, 24.0),
            LayerSensitivity("patch", "conv", 5000, None),
        ),
        device=Device(
            before=DeviceState(
                board="Orin", mhz={"cpu0": 1500.0}, max_mhz={"cpu0": 2200.0}, celsius={"cpu": 50.5}
            ),
            after=DeviceState(
                mhz={"cpu0": 800.0}, celsius={"cpu": 81.0}, throttle_events={"over-current": 3}
            ),
            bundle_sha256="2" * 64,
            throttled=("cpu0: 1500 to 800 MHz",),
        ),
    )


@pytest.mark.parametrize("page", PAGES)
def test_no_console_error_and_no_request(browser, pages, page):
    """Opening a page asks for the file alone and prints nothing to the console, hostile names or not."""
    browser.open(pages[page])
    assert browser.console() == []
    assert browser.requests() == [pages[page].as_uri()]
    assert browser.count("script, link, iframe, [onerror], :not(img)[src]") == 0
    pictures = browser.run(
        "return [...document.images].map(i => [i.src.slice(0, 23), i.alt, i.naturalWidth])"
    )
    assert bool(pictures) is (page != "comparison")
    assert all(src == "data:image/jpeg;base64," and alt and width > 9 for src, alt, width in pictures)


@pytest.mark.parametrize("page", PAGES)
def test_every_chart_is_drawn_whole(browser, pages, page):
    """Each chart has a size, shapes, a text alternative with its numbers, and no text cut off."""
    browser.open(pages[page])
    drawn = browser.run("""return [...document.querySelectorAll('figure')].map(f => {
        const svg = f.querySelector('svg'), box = svg.getBoundingClientRect();
        const shapes = [...svg.querySelectorAll('.series .rect, .series .dot, .ci path')];
        return [f.querySelector('strong').innerText, svg.getAttribute('role'),
                svg.getAttribute('aria-label'), box.width, box.height,
                shapes.filter(s => s.getBoundingClientRect().width > 2).length]; })""")
    assert [chart[0] for chart in drawn] == CHARTS[page]
    for title, role, words, width, height, shapes in drawn:
        assert role == "img" and words.startswith(f"{title}. ") and any(c.isdigit() for c in words)
        least = 1 if title == "Accuracy lost" else 2  # a drop of exactly 0 draws its interval, no bar
        assert width > 300 and height > 80 and shapes >= least, title
    assert browser.run(_CUT) == []


@pytest.mark.parametrize("page", PAGES)
def test_keyboard_reaches_and_scrolls_every_table(browser, pages, page):
    """Tab goes through all tables, wide pictures and folded parts in order with a visible focus.

    The arrow keys scroll a wide table.
    """
    browser.open(pages[page], width=360)
    regions = browser.run("""return [...document.querySelectorAll('.scroll, summary')]
        .filter(e => e.checkVisibility()).map(e => e.getAttribute('aria-label') || e.textContent)""")
    tables = browser.run("return [...document.querySelectorAll('table')].map(t => t.caption.innerText)")
    assert set(tables) <= set(regions)
    reached = []
    for _ in regions:
        browser.tab()
        reached.append(browser.focused())
        assert browser.run("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert regions and reached == regions
    browser.run("document.querySelector('.scroll').focus()")
    for _ in range(4):
        browser.press(Keys.ARROW_RIGHT)
    assert browser.driver.execute_async_script(
        "const done = arguments[0], box = document.activeElement, since = performance.now();"
        "(function wait() { if (box.scrollLeft > 0 || performance.now() - since > 3000) done(box.scrollLeft);"
        " else requestAnimationFrame(wait); })();"
    ) > 0  # fmt: skip


@pytest.mark.parametrize("width", [360, 1100])
@pytest.mark.parametrize("page", PAGES)
def test_both_schemes_have_contrast_and_fit(browser, pages, page, width):
    """In light and dark all text has a contrast of 4.5 (WCAG AA), and the page never scrolls sideways."""
    papers = []
    for scheme in ("light", "dark"):
        browser.open(pages[page], width=width, scheme=scheme)
        texts = browser.run(_COLOURS)
        faint = {text for text, ink, paper in texts if contrast(ink, paper) < 4.5}
        assert len(texts) > 50 and not faint
        assert browser.run("return document.documentElement.scrollWidth") <= width
        papers.append(browser.run("return getComputedStyle(document.body).backgroundColor"))
        assert browser.screenshot(f"{page}-{scheme}-{width}").stat().st_size > 20_000
    assert papers[0] != papers[1]


def test_print_is_black_on_white_and_whole(browser, pages):
    """Printed from a dark desktop, the page is light and its tables are not clipped."""
    browser.open(pages["every-kind"], scheme="dark")
    browser.emulate("print", "dark")
    texts = browser.run(_COLOURS)
    assert all(contrast(ink, (255, 255, 255)) >= 4.5 for _, ink, _ in texts)
    assert browser.run("return getComputedStyle(document.querySelector('.scroll')).overflowX") == "visible"


def test_every_kind_of_row_reads_correctly(browser, pages):
    """Failed, not run and undecided say so and why; nothing that was not measured looks measured."""
    browser.open(pages["every-kind"])
    cards = browser.run("return [...document.querySelectorAll('.card')].map(c => c.innerText)")
    said = {card.splitlines()[0]: " ".join(card.split()) for card in cards}
    assert "NOT RUN needs an NVIDIA GPU and driver" in said["tensorrt int8 224x224"]
    assert "FAILED <b>died</b> | with SIGSEGV" in said["coreml int8 224x224"]
    assert "SHIP" in said["onnx fp16 224x224"] and "HOLD" in said["openvino int8 224x224"]
    assert "top1_drop: 0.2, limit 0.3: UNDECIDED (30 images are too few)" in said["onnx fp16 224x224"]
    assert "2 of 6 artifacts can ship: 2 hold, 1 failed, 1 not run." in browser.text()
    row = browser.run("""return [...document.querySelectorAll('tbody tr')].map(r => r.innerText.split('\\t'))
        .find(cells => cells[0].startsWith('tensorrt'))""")
    assert row[1:] == ["-"] * 8 + ["NOT RUN"]
    latency = browser.run("return document.querySelector('figure svg').getAttribute('aria-label')")
    assert "tensorrt" not in latency and "onnx fp16, 2.57x: p50 37.0 ms, p99 74.0 ms" in latency


def test_flipped_images_are_shown(browser, pages):
    """Each changed image is a picture with FP32's class, the artifact's and its file's name."""
    browser.open(pages["every-kind"])
    first = browser.run("""return [...document.querySelectorAll('.flips')[0].children].map(
        li => [li.querySelector('img').alt, li.innerText.split('\\n')])""")
    assert [alt for alt, _ in first] == [
        f"image {i}: FP32 {before}, now {now}, label {now}"
        for i, before, now in ((3, 5, 3), (8, 5, 8), (44, 1, 4))
    ]
    assert first[0][1] == ["5 → 3", "gained, label 3", "<i>3</i>.png"]


def test_folded_parts_open(browser, pages):
    """Enter on a summary unfolds histograms and heads; each drawing then has a size and words."""
    browser.open(pages["default"], width=360)
    browser.run("document.querySelector('summary').focus()")
    browser.press(Keys.ENTER)
    drawn = browser.run("""return [...document.querySelectorAll('.histograms li')].map(li => {
        const svg = li.querySelector('svg'), bars = svg.querySelector('.count').getBoundingClientRect();
        return [svg.getAttribute('aria-label'), bars.width, bars.height]; })""")
    assert len(drawn) == 18
    assert all("range" in words and width > 150 and height > 20 for words, width, height in drawn)
    browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.run("return document.documentElement.scrollWidth") <= 360


def test_sensitive_layers_are_marked(browser, pages):
    """A layer kept float is named so in the chart and its table row, with the reason."""
    browser.open(pages["every-kind"])
    words = browser.run("""return [...document.querySelectorAll('figure')].find(
        f => f.innerText.startsWith('Sensitivity')).querySelector('svg').getAttribute('aria-label')""")
    assert "blocks.0.attn.qkv (kept float): 21.5 dB; head: 48.0 dB" in words and "patch" not in words
    rows = browser.run(
        """return [...document.querySelectorAll('tbody tr')].map(r => r.innerText.split('\\t'))"""
    )
    assert ["blocks.0.attn.qkv", "linear", "1.2", "21.5", "33.0", "yes: 21.5 dB alone"] in rows
    assert ["patch", "conv", "0.0", "-", "-", "no"] in rows
    assert ["rounding", "gptq", "yes", "27.5", "0.985", "-"] in rows
    assert ["rounding", "nearest", "no", "-", "-", "-"] in rows


def test_the_device_is_told_in_full(browser, pages):
    """Board, every sensor before and after with its limit, and what slowed the device."""
    browser.open(pages["every-kind"])
    rows = browser.run(
        """return [...document.querySelectorAll('tbody tr')].map(r => r.innerText.split('\\t'))"""
    )
    assert ["cpu0", "1500 MHz", "800 MHz", "2200 MHz"] in rows
    assert ["cpu", "50.5 °C", "81 °C", "-"] in rows and ["over-current", "-", "3 events", "-"] in rows
    assert "board: Orin" in browser.text() and "slowed while measuring" in browser.text()


def test_hostile_names_are_shown_as_they_are(browser, pages):
    """Markup in a model's name is text in the heading, the window's title and the command."""
    browser.open(pages["every-kind"])
    shown = HOSTILE.replace("\x1b[31m", "")
    assert browser.run("return document.querySelector('h1').textContent") == f"vit-export: {shown}"
    assert browser.driver.title == f"vit-export: {shown}"
    assert shown in browser.run("return document.querySelector('pre').textContent")


def contrast(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    """WCAG 2.2 contrast ratio of two sRGB colours."""
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def luminance(colour: tuple[int, ...]) -> float:
    """WCAG 2.2 relative luminance."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)]
    return float(np.dot((0.2126, 0.7152, 0.0722), linear))
