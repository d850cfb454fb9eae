"""What the tokens of all images have in common at some places of a network: the mean of each channel."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from vit_export.artifacts import Images


def channel_means(graph: GraphModule, nodes: Collection[str], batches: Iterable[Images]) -> dict[str, Tensor]:
    """Mean over images and tokens of each channel (the last axis) of the named nodes, float64 [C] by name.

    batches: float32 [n, 3, H, W].
    """
    watch = _Sums(graph, nodes)
    with torch.inference_mode():
        for images in batches:
            watch.run(torch.from_numpy(images))
    return {name: total / watch.rows[name] for name, total in watch.sums.items()}


class _Sums(Interpreter):
    """Sums each channel of the named nodes, float64 [C], and counts what went into it."""

    def __init__(self, graph: GraphModule, nodes: Collection[str]) -> None:
        super().__init__(graph)
        self._nodes = nodes
        self.sums: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.name in self._nodes:
            rows = value.reshape(-1, value.shape[-1])
            self.sums[n.name] = self.sums.get(n.name, 0) + rows.sum(0, dtype=torch.float64)
            self.rows[n.name] = self.rows.get(n.name, 0) + len(rows)
        return value
