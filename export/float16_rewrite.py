"""Rewriting the types of an ONNX graph once it is decided which nodes stay float32."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
HALF_MAX = 65504.0

# Inputs that the operator's definition keeps float32 whatever its data is.
_FLOAT_INPUTS: Mapping[str, tuple[int, ...]] = {"Resize": (1, 2), "Upsample": (1,)}


class HalfRewrite:
    """Turns every float32 tensor into float16 but those of the nodes `kept`, with Casts between.

    Graph inputs and outputs keep their type and names. Constants beyond ±65504 become ±65504.
    """

    def __init__(self, graph: ir.Graph, kept: set[ir.Node]) -> None:
        self._graph = graph
        self._kept = kept
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self._saturated: list[str] = []

    def run(self) -> tuple[str, ...]:
        """Convert everything; the names of saturated constants."""
        outputs = [value for value in self._graph.outputs if value.dtype == FLOAT]
        nodes = list(self._graph)
        for node in nodes:
            if node not in self._kept and not _is_border(node):
                self._convert_node(node)
        for value in list(self._graph.initializers.values()):
            if value.dtype == FLOAT and {self._wanted(node, i) for node, i in value.uses()} == {HALF}:
                self._convert_constant(value)
        for node in nodes:
            for index, value in enumerate(node.inputs):
                if value is not None and value.dtype in (FLOAT, HALF):
                    node.replace_input_with(index, self._as(value, self._wanted(node, index)))
        for value in outputs:
            if value.dtype == HALF:
                self._restore_output(value)
        return tuple(self._saturated)

    def _wanted(self, node: ir.Node, index: int) -> ir.DataType:
        """The type a node reads its input in; a Cast takes what it is given."""
        value = node.inputs[index]
        if node.op_type == "Cast" and value is not None and value.dtype is not None:
            return value.dtype
        stays = node in self._kept or index in _FLOAT_INPUTS.get(node.op_type, ())
        return FLOAT if stays else HALF

    def _convert_node(self, node: ir.Node) -> None:
        """Attributes that name or hold a type, and the type of the outputs."""
        if node.op_type == "Cast" and node.attributes["to"].as_int() == FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", int(HALF))
        if node.op_type == "ConstantOfShape" and "value" in node.attributes:
            fill = node.attributes["value"].as_tensor()
            if fill.dtype == FLOAT:
                half = np.clip(fill.numpy(), -HALF_MAX, HALF_MAX).astype(np.float16)
                node.attributes["value"] = ir.AttrTensor("value", ir.tensor(half))
        for value in node.outputs:
            if value.dtype == FLOAT:
                value.type = ir.TensorType(HALF)

    def _as(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        """`value` in the wanted type: itself, a converted constant, or one shared Cast."""
        if value.dtype == wanted:
            return value
        if (value, wanted) not in self._casts:
            constant = value.const_value is not None and value.producer() is None
            self._casts[value, wanted] = self._copy_constant(value) if constant else self._cast(value, wanted)
        return self._casts[value, wanted]

    def _convert_constant(self, value: ir.Value) -> None:
        """An initialiser that only float16 nodes read, under its own name."""
        value.const_value = ir.tensor(self._half(value), name=value.name)
        value.type = ir.TensorType(HALF)

    def _copy_constant(self, value: ir.Value) -> ir.Value:
        """A float16 initialiser beside the float32 one that other nodes read."""
        data = ir.tensor(self._half(value), name=f"{value.name}.half")
        half = ir.Value(name=data.name, type=ir.TensorType(HALF), shape=value.shape, const_value=data)
        self._graph.register_initializer(half)
        return half

    def _half(self, value: ir.Value) -> npt.NDArray[np.float16]:
        assert value.const_value is not None
        data = value.const_value.numpy()
        if (np.abs(data) > HALF_MAX).any():
            self._saturated.append(value.name or "?")
        half: npt.NDArray[np.float16] = np.clip(data, -HALF_MAX, HALF_MAX).astype(np.float16)
        return half

    def _cast(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        kind = "Float32" if wanted == FLOAT else "Float16"
        cast = ir.node("Cast", [value], attributes={"to": int(wanted)}, name=f"{value.name}/To{kind}")
        out = cast.outputs[0]
        out.name, out.type, out.shape = f"{value.name}.{kind.lower()}", ir.TensorType(wanted), value.shape
        producer = value.producer()
        if producer is None:
            self._graph.insert_before(self._graph[0], cast)
        else:
            self._graph.insert_after(producer, cast)
        return out

    def _restore_output(self, value: ir.Value) -> None:
        """A graph output that became float16: cast it back under its own name."""
        cast = self._cast(value, FLOAT)
        cast.name, value.name = value.name, f"{value.name}.half"
        for index, output in enumerate(self._graph.outputs):
            if output is value:
                self._graph.outputs[index] = cast


def _is_border(node: ir.Node) -> bool:
    """A Cast whose only purpose is the type of a graph output: it stays what it is."""
    out = node.outputs[0]
    return node.op_type == "Cast" and out.is_graph_output() and not out.uses()
