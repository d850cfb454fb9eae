"""Finding what can be quantised in a traced graph, and what it costs."""

from __future__ import annotations

import math
from collections import Counter
from typing import Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from vit_export.artifacts import Layer
from vit_export.export.graph import aten, module_path

_KINDS: dict[object, Literal["linear", "conv"]] = {
    aten.linear.default: "linear",
    aten.conv2d.default: "conv",
    aten.conv2d.padding: "conv",
}
_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default)


def layer_name(weight: str) -> str:
    """The name users see: the weight's name without its last part (`blocks.3.mlp.fc1`)."""
    for suffix in (".weight", "_weight"):
        if weight.endswith(suffix):
            return weight.removesuffix(suffix)
    return weight


def constant(module: GraphModule, name: str) -> Tensor:
    """The parameter or buffer behind a fully qualified name."""
    owner, _, attribute = name.rpartition(".")
    value = getattr(module.get_submodule(owner), attribute)
    assert isinstance(value, Tensor)
    return value


def find_layers(module: GraphModule, shapes: dict[str, tuple[int, ...]]) -> tuple[Layer, ...]:
    """Linears and convolutions whose weight is a constant, in execution order.

    shapes: of every tensor for one image, by node name (see `Shapes`). A weight used twice gives two
    layers, the second named `name#2`.
    """
    layers: list[Layer] = []
    seen: Counter[str] = Counter()
    for node in module.graph.nodes:
        kind = _KINDS.get(node.target)
        if kind is None or not _is_constant(node.args[1]):
            continue
        weight = str(node.args[1].target)
        bias = node.args[2] if len(node.args) > 2 else None
        name = layer_name(weight)
        seen[name] += 1
        shape = tuple(constant(module, weight).shape)
        layers.append(
            Layer(
                name=name if seen[name] == 1 else f"{name}#{seen[name]}",
                kind=kind,
                node=node.name,
                weight=weight,
                bias=str(bias.target) if _is_constant(bias) and isinstance(bias, Node) else None,
                shape=shape,
                macs=math.prod(shapes[node.name]) * math.prod(shape[1:]),
            )
        )
    return tuple(layers)


def attention_macs(module: GraphModule, shapes: dict[str, tuple[int, ...]]) -> int:
    """MACs of one image in products of two activations (attention scores and their use)."""
    total = 0
    for node in module.graph.nodes:
        if node.target is aten.scaled_dot_product_attention.default:
            query, key = (shapes[node.args[i].name] for i in (0, 1))
            value = shapes[node.args[2].name]
            total += math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
        elif node.target in _PRODUCTS and node.target is not aten.einsum.default:
            left = shapes[node.args[-2 if node.target is aten.baddbmm.default else 0].name]
            total += math.prod(shapes[node.name]) * left[-1]
    return total


def _is_constant(node: object) -> bool:
    return isinstance(node, Node) and node.op == "get_attr"


class Shapes(Interpreter):
    """Runs a graph once and notes the shape of every tensor by node name."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[str, tuple[int, ...]] = {}

    def run_node(self, n: Node) -> object:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n.name] = tuple(value.shape)
        return value

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, dict[str, tuple[int, ...]]]:
        """Output and shapes for float32 NCHW images."""
        return self.run(images), self.shapes


def first_bad(module: GraphModule, images: Tensor) -> str:
    """Where NaN or Inf first appears for these images, in words. Infinite constants (masks) are not bad."""

    class Finder(Interpreter):
        def run_node(self, n: Node) -> object:
            value = super().run_node(n)
            if n.op == "call_function" and isinstance(value, Tensor) and value.is_floating_point():
                inputs = (self.env.get(i) for i in n.all_input_nodes)
                clean = all(bool(torch.isfinite(i).all()) for i in inputs if isinstance(i, Tensor))
                if clean and not torch.isfinite(value).all():
                    raise _Found(n)
            return value

    try:
        with torch.inference_mode():
            Finder(module, garbage_collect_values=False).run(images)
    except _Found as found:
        return f"first in {module_path(found.node) or 'the top module'} ({found.node.target})"
    return "its place could not be told: a constant is not finite"


class _Found(Exception):
    """Ends an interpreter's run at a node."""

    def __init__(self, node: Node) -> None:
        super().__init__(node.name)
        self.node = node
