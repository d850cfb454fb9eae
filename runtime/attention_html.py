"""Attention in a page: a section of report.html, and the page that `vit-export attention` writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from vit_export.runtime.attention_file import FOLDER, AttentionFile, AttentionImage, AttentionLayer
from vit_export.runtime.html_charts import Bar, available, bars, figure
from vit_export.runtime.html_tree import Node, el, items, page, section, table
from vit_export.runtime.pictures import data_uri
from vit_export.runtime.report_cells import number

HEADERS = ("layer", "heads", "tokens", "map", "KL nats")
_MANY = 40  # layers in the chart, those that changed most

_LEGEND = (
    "Rows are FP32, int8 and the change between them, enlarged as its label "
    "says (red: int8 looks there more). The colours of a column run from "
    "0 to its largest weight in either precision. A map is the class token's row of the softmax over the "
    "patches; where there is no class token, the mean of all rows; in windowed layers, how much each "
    "token is looked at from inside its window. Rollout multiplies the layers, heads averaged and the "
    "residual added (Abnar and Zuidema 2020). KL is the mean of KL(FP32 || int8) over all rows of all heads."
)


def render(found: AttentionFile, output: Path) -> bytes:
    """The page of one `vit-export attention`, with its pictures inside."""
    title = f"vit-export attention: {found.model}"
    intro = el("header", el("h1", title), el("p", f"int8: {found.int8}", class_="soft"))
    return page(title, intro, el("main", section("Attention", *parts(found, output))))


def parts(found: AttentionFile, output: Path) -> Iterator[Node | None]:
    """Legend, table, chart and pictures. Raises InputError for pictures that are gone or broken."""
    yield el("p", _LEGEND, class_="soft")
    headers, body = table_of(found)
    chart = divergence(found) if available() else None
    yield el("div", chart, class_="charts") if chart is not None else None
    yield table("Attention layers", headers, body, numbers=False)
    for image in found.images:
        yield _image(image, output / FOLDER)


def table_of(found: AttentionFile) -> tuple[Sequence[str], list[tuple[str, ...]]]:
    """(headers, rows): each layer with its KL averaged over the images."""
    layers = found.images[0].layers if found.images else ()
    means = means_of(found)
    return HEADERS, [
        (
            layer.name,
            str(layer.heads),
            str(layer.queries) if layer.queries == layer.keys else f"{layer.queries} on {layer.keys}",
            f"{layer.grid[0]}x{layer.grid[1]}, {layer.query}"
            if layer.grid
            else f"not available: {layer.reason}",
            number(means.get(layer.name), ".2g"),
        )
        for layer in layers
    ]


def means_of(found: AttentionFile) -> dict[str, float]:
    """Mean KL by layer; empty without int8."""
    values: dict[str, list[float]] = {}
    for layer in (layer for image in found.images for layer in image.layers):
        if layer.kl is not None:
            values.setdefault(layer.name, []).append(layer.kl)
    return {name: sum(kls) / len(kls) for name, kls in values.items()}


def divergence(found: AttentionFile) -> Node | None:
    """KL by layer, in order; the ones that changed most where there are many."""
    means = means_of(found)
    if not means:
        return None
    most = sorted(means, key=lambda name: -means[name])[:_MANY]
    shown = {name: kl for name, kl in means.items() if name in most}
    words = "; ".join(f"{name}: {kl:.2g}" for name, kl in shown.items())
    caption = "Mean KL divergence of int8 attention from FP32's, in nats; shorter is better."
    drawing = bars(list(shown), {"KL": [Bar(kl) for kl in shown.values()]})
    return figure("Attention changed by int8", caption, words, drawing)


def _image(image: AttentionImage, folder: Path) -> Node:
    classes = {"FP32 class": image.float_class, "int8 class": image.int8_class}
    said = ", ".join(f"{name} {value}" for name, value in classes.items() if value is not None)
    rollout = f"rollout not available: {image.rollout_reason}" if image.rollout_reason else ""
    return el(
        "div",
        el("h3", image.name),
        el("p", said) if said else None,
        items((rollout,)),
        _picture(folder, image.rollout_picture, f"Attention rollout on {image.name}"),
        _picture(folder, image.layers_picture, f"Mean over heads of each layer's attention on {image.name}"),
        *(_heads(folder, layer, image.name) for layer in image.layers if layer.picture),
    )


def _heads(folder: Path, layer: AttentionLayer, image: str) -> Node:
    kl = "" if layer.kl is None else f", KL {layer.kl:.2g}"
    words = f"{layer.name}{kl}: attention of each head on {image}"
    return el(
        "details", el("summary", f"{layer.name}{kl}: each head"), _picture(folder, layer.picture, words)
    )


def _picture(folder: Path, name: str | None, words: str) -> Node | None:
    """A picture as wide as it is, in a region that scrolls where the screen is narrower."""
    if name is None:
        return None
    uri, (width, height) = data_uri(folder, name)
    image = el("img", src=uri, alt=words, width=str(width), height=str(height))
    return el("div", image, class_="scroll", role="region", tabindex="0", aria_label=words)
