"""Editing a traced graph without touching the weights it shares with other programs.

An edit works on an `Edit`: a private copy of the nodes and a dictionary of tensors. Tensors are shared
with the source until an edit replaces them, so a pass costs memory only for what it changes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

aten = torch.ops.aten


@dataclass(slots=True)
class Edit:
    """A graph being rewritten and the tensors its `get_attr` nodes name."""

    graph: Graph
    tensors: dict[str, Tensor]

    @staticmethod
    def of(module: GraphModule) -> Edit:
        """A copy of the nodes (with their metadata) over the same tensors."""
        graph = Graph()
        mapping: dict[Node, Node] = {}
        result = graph.graph_copy(module.graph, mapping)
        output = graph.output(result)
        output.meta = copy.copy(next(n for n in module.graph.nodes if n.op == "output").meta)
        tensors: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
        tensors.update(module.named_buffers(remove_duplicate=False))
        for node in graph.find_nodes(op="get_attr"):  # torch.export makes literals plain attributes
            if node.target not in tensors:
                tensors[str(node.target)] = attrgetter(str(node.target))(module)
        return Edit(graph, tensors)

    def build(self) -> GraphModule:
        """Drop what nothing uses and return the new module, which owns its own attribute tree."""
        self.graph.eliminate_dead_code()
        for node in self.graph.find_nodes(op="get_attr"):
            if not node.users:
                self.graph.erase_node(node)
        self.graph.lint()
        used = {str(n.target) for n in self.graph.nodes if n.op == "get_attr"}
        module = GraphModule({name: self.tensors[name] for name in used}, self.graph)
        module.eval()
        return module

    def tensor(self, node: object) -> Tensor | None:
        """The constant a node reads, or None when it is not a constant."""
        if isinstance(node, Node) and node.op == "get_attr":
            return self.tensors.get(str(node.target))
        return None

    def replace_tensor(self, node: Node, value: Tensor) -> None:
        """Give the constant behind `node` a new value under the same name."""
        self.tensors[str(node.target)] = value.detach()

    def constant(self, name: str, value: Tensor, before: Node) -> Node:
        """Add a constant, named uniquely after `name`, readable from `before` on."""
        unique, count = name, 1
        while unique in self.tensors:
            count += 1
            unique = f"{name}_{count}"
        self.tensors[unique] = value.detach()
        return self.read(unique, before)

    def read(self, name: str, before: Node) -> Node:
        """Read a constant in front of a node, with its shape where passes look for it."""
        with self.graph.inserting_before(before):
            node = self.graph.get_attr(name)
        node.meta["val"] = self.tensors[name].detach().to("meta")
        return node

    def call(self, before: Node, target: object, *args: object) -> Node:
        """Insert a call that carries the module path of the node it stands before."""
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args)  # type: ignore[arg-type]
        node.meta = {k: v for k, v in before.meta.items() if k in ("nn_module_stack", "stack_trace")}
        return node

    def nodes(self, *targets: object) -> Iterator[Node]:
        """Calls of any of these operators, in order; safe while the graph is being edited."""
        return (n for n in list(self.graph.nodes) if n.op == "call_function" and n.target in targets)

    def bypass(self, node: Node, source: Node) -> None:
        """Let the users of `node` read `source` instead."""
        node.replace_all_uses_with(source)
        self.graph.erase_node(node)


def like_its_input(node: Node) -> Node:
    """Note that a call gives what its first argument gives: the same shape and type."""
    if isinstance(node.args[0], Node) and "val" in node.args[0].meta:
        node.meta["val"] = node.args[0].meta["val"]
    return node


def sole_user(node: Node) -> Node | None:
    """The one node that reads this one, or None when there are several."""
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def module_path(node: Node) -> str:
    """The innermost module a node was traced in (`blocks.3.attn`); empty at the top."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return str(paths[-1]) if paths else ""


@contextmanager
def exact_attention() -> Iterator[None]:
    """Trace attention as one operator with plain strides.

    The fast path of nn.MultiheadAttention hides its products from the graph, and the fused CPU kernel's
    output strides break later views (facts: timm BEiT).
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel([SDPBackend.MATH]):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
