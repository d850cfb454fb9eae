"""A program as a runtime computes it that keeps every tensor in float16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node


def half_stored(graph: GraphModule) -> Callable[[Tensor], Tensor]:
    """float32 [N, 3, H, W] to float32 [N, K]: operators compute in float32, what they give is rounded.

    Weights, input and every result pass through float16. A tensor with values beyond 65504 stays float32, as
    targets keep what would overflow.
    """
    run: Callable[[Tensor], Tensor] = _HalfStored(graph).run
    return run


class _HalfStored(Interpreter):
    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if not isinstance(value, Tensor) or value.dtype is not torch.float32:
            return value
        half = value.half()
        return value if bool((half.isinf() & value.isfinite()).any()) else half.float()
