"""float32 to float16 for a whole ONNX graph, except where float16 cannot hold the numbers.

Inputs and outputs stay float32, with a Cast at the border. A node stays float32 (an island between
Casts) when a tensor it reads or writes comes near the largest float16, when it sums squares that do,
or when a constant it needs would vanish. Q/DQ scales become float16 too, so that a runtime can fuse
a DequantizeLinear with the product behind it (opset 19 and later).

What a strongly typed TensorRT network needs, and what `--fp16` means for ONNX Runtime.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common

from vit_export.errors import TargetError, UnsupportedOperator

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
HALF_MAX = 65504.0
HALF_TINY = 2.0**-24  # the smallest float16 above 0
HEADROOM = 2.0  # unseen images may go so many times higher than those measured
_SMALLEST_SCALE = 2.0**-20  # below, float16 keeps a scale to worse than 3 %

# Inputs that the operator's definition keeps float32 whatever its data is.
_FLOAT_INPUTS: Mapping[str, tuple[int, ...]] = {"Resize": (1, 2), "Upsample": (1,)}
# Operators whose sum, or sum of squares, overflows before their inputs do.
_SUMS = ("ReduceSum", "ReduceMean", "ReduceL1", "GlobalAveragePool")
_SQUARES = ("LayerNormalization", "InstanceNormalization", "GroupNormalization", "ReduceL2")
_SUBGRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
# Operators for which a constant beyond float16 means "no limit" or "masked".
_SATURATING = ("Add", "Where", "Clip", "Max", "Min")


@dataclass(frozen=True, slots=True)
class HalfReport:
    """What was not a plain conversion. kept: node name → why it stays float32. saturated: constants
    whose values beyond ±65504 became ±65504 (masks, limits)."""

    kept: Mapping[str, str]
    saturated: tuple[str, ...]


def to_float16(
    model: ir.Model, peaks: Mapping[str, float] | None = None, keep: Sequence[str] = ()
) -> HalfReport:
    """Convert `model` in place and say what stayed float32.

    peaks: max |x| by tensor name (peaks.measure_peaks). Without it every normalisation stays float32
    and no other overflow is foreseen. keep: globs over node names and their module paths.
    Raises UnsupportedOperator for control flow, TargetError for Q/DQ below opset 19.
    """
    _check(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True)(model)
    if any(value.dtype is None for node in model.graph for value in node.outputs):
        common.ShapeInferencePass()(model)
    kept = dict(_islands(model.graph, peaks, keep))
    saturated = _Conversion(model.graph, set(kept)).run()
    common.RemoveUnusedNodesPass()(model)
    return HalfReport({node.name or node.op_type: reason for node, reason in kept.items()}, saturated)


def _check(model: ir.Model) -> None:
    quantized = any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph)
    opset = model.graph.opset_imports.get("", 0)
    if quantized and opset < 19:
        raise TargetError(
            f"float16 scales need opset 19, the graph has {opset}", "export with --opset 20 or later"
        )
    for node in model.graph:
        if any(attribute.type in _SUBGRAPHS for attribute in node.attributes.values()):
            raise UnsupportedOperator(
                f"{node.name} ({node.op_type}) has a subgraph",
                "float16 conversion takes straight-line graphs; try --fp32",
            )


def _islands(
    graph: ir.Graph, peaks: Mapping[str, float] | None, keep: Sequence[str]
) -> Iterator[tuple[ir.Node, str]]:
    """Every node that must stay float32, with the reason."""
    for node in graph:
        reason = _asked(node, keep) or _range_reason(node, peaks) or _constant_reason(node)
        if reason:
            yield node, reason


def _asked(node: ir.Node, keep: Sequence[str]) -> str:
    """Whether a glob of the user's names the node (`blocks.3.attn.proj/MatMul`) or its module."""
    name = node.name or ""
    names = (name, name.rpartition("/")[0])
    return next((f"asked for by {p}" for p in keep if any(fnmatch.fnmatch(n, p) for n in names)), "")


def _range_reason(node: ir.Node, peaks: Mapping[str, float] | None) -> str:
    """Why the ranges forbid float16: a tensor too large, or a sum or square of it."""
    if peaks is None:
        return "no ranges were measured" if node.op_type in _SQUARES else ""
    limit = HALF_MAX / HEADROOM
    for value in (*node.inputs, *node.outputs):
        peak = peaks.get(value.name or "", 0.0) if value is not None else 0.0
        if peak > limit:
            return f"{value.name} reaches {peak:.3g}" if value is not None else ""
    peak = peaks.get(node.inputs[0].name or "", 0.0) if node.inputs and node.inputs[0] else 0.0
    if node.op_type in _SQUARES and peak * peak > limit:
        return f"squares of its input reach {peak * peak:.3g}"
    if node.op_type in _SUMS and peak * _reduced(node) > limit:
        return f"its sum may reach {peak * _reduced(node):.3g}"
    return ""


def _reduced(node: ir.Node) -> int:
    """How many numbers a reduction adds up for one of its outputs, 1 where shapes do not say."""
    before, after = (_elements(v) for v in (node.inputs[0], node.outputs[0]))
    return max(1, before // after) if before and after else 1


def _elements(value: ir.Value | None) -> int:
    """Elements of one image: symbolic dimensions (the batch) count as one."""
    if value is None or value.shape is None:
        return 0
    return math.prod(dim for dim in value.shape if isinstance(dim, int))


def _constant_reason(node: ir.Node) -> str:
    """Why a constant forbids float16: a scalar that would become 0, a weight or a scale out of range."""
    for index, value in enumerate(node.inputs):
        if value is None or value.dtype != FLOAT or value.const_value is None:
            continue
        data = np.abs(value.const_value.numpy())
        finite = data[np.isfinite(data)]
        if data.size == 1 and 0 < data.item() < HALF_TINY:
            return f"{value.name} = {data.item():.3g} is 0 in float16"
        if index == 1 and node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            if finite.size and finite.min() < _SMALLEST_SCALE:
                return f"scale {value.name} goes down to {finite.min():.3g}"
        elif finite.size and finite.max() > HALF_MAX and node.op_type not in _SATURATING:
            return f"{value.name} reaches {finite.max():.3g}"
    return ""


class _Conversion:
    """Rewrites types once it is decided which nodes stay float32."""

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
            if node not in self._kept:
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
                value.dtype = HALF

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
        value.dtype = HALF

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
        out.name, out.dtype, out.shape = f"{value.name}.{kind.lower()}", wanted, value.shape
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
