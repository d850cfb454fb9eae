"""HTML as a tree: text and attributes are escaped by the serialiser, so no caller can forget it.

Element trees come with Python, so a page can be written on a device that has the base install only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.etree import ElementTree

from vit_export.runtime.report_cells import printable

Node = ElementTree.Element
Child = Node | str | None

# A second lock: even if a page held a reference, the browser would fetch nothing and run nothing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_STYLE = Path(__file__).with_name("report.css")


def el(tag: str, *children: Child, **attributes: str) -> Node:
    """An element; None children are left out. `class_` is class, `aria_label` aria-label."""
    node = ElementTree.Element(tag)
    for name, value in attributes.items():
        node.set(name.rstrip("_").replace("_", "-"), printable(value))
    for child in children:
        if isinstance(child, str):
            _append_text(node, printable(child))
        elif child is not None:
            node.append(child)
    return node


def page(title: str, *body: Child) -> bytes:
    """A whole self-contained document, UTF-8."""
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        el("title", title),
        el("style", _STYLE.read_text("utf-8")),
    )
    document = el("html", head, el("body", *body), lang="en")
    text: str = ElementTree.tostring(document, "unicode", method="html")
    return f"<!DOCTYPE html>\n{text}\n".encode()


def section(title: str, *children: Child) -> Node | None:
    """A titled part of the page; None if there is nothing in it."""
    present = [child for child in children if child is not None]
    return el("section", el("h2", title), *present) if present else None


def table(
    caption: str, headers: Sequence[str], body: Iterable[Sequence[Child]], *, numbers: bool = True
) -> Node | None:
    """A table that scrolls inside a region the keyboard reaches; None if it has no rows.

    The first cell of a row is its header. numbers: right-aligned cells.
    """
    lines = [el("tr", el("th", row[0], scope="row"), *(el("td", cell) for cell in row[1:])) for row in body]
    if not lines:
        return None
    head = el("thead", el("tr", *(el("th", header, scope="col") for header in headers)))
    inner = el(
        "table", el("caption", caption), head, el("tbody", *lines), class_="numbers" if numbers else "words"
    )
    return el("div", inner, class_="scroll", role="region", tabindex="0", aria_label=caption)


def items(lines: Iterable[str]) -> Node | None:
    """A bulleted list; None if it is empty."""
    found = [el("li", line) for line in lines if line]
    return el("ul", *found) if found else None


def badge(text: str) -> Node:
    """A verdict or state: its word, and a colour that only repeats it."""
    return el("span", text, class_=f"badge {text.replace(' ', '-')}")


def _append_text(node: Node, text: str) -> None:
    if len(node):
        node[-1].tail = (node[-1].tail or "") + text
    else:
        node.text = (node.text or "") + text
