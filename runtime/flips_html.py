"""The images whose class an artifact changed, as pictures: FP32's class against the artifact's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vit_export.runtime import thumbnails
from vit_export.runtime.flips import Flip
from vit_export.runtime.html_tree import Node, el
from vit_export.runtime.pictures import data_uri
from vit_export.runtime.report_schema import Result


def gallery(result: Result, changed: Sequence[Flip], folder: Path) -> Node | None:
    """The changed images that have a thumbnail in `folder`, None without any."""
    size = result.image_size
    names = thumbnails.read_names(folder)
    shown = [
        _picture(folder, file, flip, names.get((f"{size[0]}x{size[1]}", flip.image), ""))
        for flip in changed[: thumbnails.MOST]
        if (file := thumbnails.find(folder, size, flip.image)) is not None
    ]
    return el("ul", *shown, class_="flips") if shown else None


def _picture(folder: Path, file: str, flip: Flip, name: str) -> Node:
    uri, (width, height) = data_uri(folder, file)
    label = "" if flip.label is None else f", label {flip.label}"
    words = f"image {flip.image}: FP32 {flip.before}, now {flip.after}{label}"
    return el(
        "li",
        el("img", src=uri, alt=words, width=str(width), height=str(height)),
        el("b", f"{flip.before} → {flip.after}"),
        el("span", f"{flip.outcome}{label}", class_="soft"),
        el("span", name or f"image {flip.image}", class_="soft"),
    )
