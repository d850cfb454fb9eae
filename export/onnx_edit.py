"""Small steps of editing an ONNX graph: nodes like others, constants, who reads a value."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir


def like(
    node: ir.Node, kind: str, inputs: Sequence[ir.Value | None], attributes: dict[str, object] | None = None
) -> ir.Node:
    """A node of another kind that stands before `node` and comes from the same module."""
    made = ir.node(kind, inputs, attributes=attributes or {}, metadata_props=dict(node.metadata_props))
    assert node.graph is not None
    node.graph.insert_before(node, made)
    return made


def constant(value: ir.Value | None) -> npt.NDArray[np.generic] | None:
    """The array of an initializer or Constant, or None."""
    tensor = value.const_value if value is not None else None
    if tensor is None and value is not None:
        tensor = ir.convenience.get_const_tensor(value)
    return tensor.numpy() if tensor is not None else None


def add_initializer(model: ir.Model, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
    """Add a named initializer and return its value."""
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape)
    model.graph.register_initializer(value)
    return value


def shape_initializer(model: ir.Model, dims: Sequence[int]) -> ir.Value:
    """The shape that a Reshape is given, one initializer for all that want it; 0 keeps the dimension."""
    name = f"shape_{'_'.join(map(str, dims))}"
    return model.graph.initializers.get(name) or add_initializer(model, name, np.array(dims, np.int64))


def replace(node: ir.Node, value: ir.Value) -> None:
    """Let the users of a one-output node read `value`, and remove the node.

    Where the graph returned the node's output, it returns `value` under the same name.
    """
    old = node.outputs[0]
    name = old.name if old.is_graph_output() else None
    value.shape, value.type = old.shape, old.type
    old.replace_all_uses_with(value, replace_graph_outputs=True)
    assert node.graph is not None
    node.graph.remove(node, safe=True)
    if name is not None:
        old.name, value.name = f"{name}.replaced", name


def ints(node: ir.Node, index: int) -> Sequence[int] | None:
    array = constant(node.inputs[index]) if len(node.inputs) > index else None
    return None if array is None else [int(i) for i in array.reshape(-1)]


def only_user(value: ir.Value) -> ir.Node | None:
    """The one node that reads a value; None where several do or the graph returns it."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None
