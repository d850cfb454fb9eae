"""Building the module of an ONNX graph: constants folded, layers found, everything named.

What depends on constants alone is computed here (a transposed weight, a mask). Products with a constant
matrix become nn.Linear, with the bias added after them, so that they are found and quantised like those of
any other model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from vit_export.errors import UnsupportedOperator
from vit_export.models.onnx_call import Host, Value, as_tensor
from vit_export.models.onnx_layers import LAYERS, matrix
from vit_export.models.onnx_module import OnnxModule, Step, evaluate, with_frees
from vit_export.models.onnx_names import clean, container, layer_path, unique
from vit_export.models.onnx_ops import OPS, TYPES

_SMALL = 64  # integer constants up to this many values are shapes and indices, kept on the host
_DOMAINS = ("", "ai.onnx")
_SCOPES = "pkg.torch.onnx.name_scopes"
_QUANTIZED = ("Quantize", "QLinear", "Integer")
_CONSTANT = ("value", "value_float", "value_int", "value_floats", "value_ints")


def build(model: onnx.ModelProto) -> OnnxModule:
    """The module of a checked model whose one input is the image.

    Raises UnsupportedOperator naming the node that cannot be imported.
    """
    constants = {t.name for t in model.graph.initializer}
    source = next(i.name for i in model.graph.input if i.name not in constants)
    opset = next(o.version for o in model.opset_import if o.domain in _DOMAINS)
    return _Builder(OnnxModule(source, [o.name for o in model.graph.output], opset)).build(model.graph)


class _Builder:
    """constants: value → folded constant. names: value → what the file calls the constant behind it."""

    def __init__(self, module: OnnxModule) -> None:
        self.module = module
        self.constants: dict[str, Value] = {}
        self.names: dict[str, str] = {}
        self.steps: list[Step] = []

    def build(self, graph: onnx.GraphProto) -> OnnxModule:
        for tensor in graph.initializer:
            self._keep(tensor.name, _array(tensor), tensor.name)
        for index, node in enumerate(graph.node):
            self._node(node, index)
        self._join_biases()
        self.steps = [self._with_layer(step) for step in self.steps]
        self._register_constants()
        self.module.steps = with_frees(self.steps, self.module.outputs)
        return self.module

    def _keep(self, name: str, value: Value, origin: str) -> None:
        self.constants[name] = _placed(value)
        self.names[name] = origin

    def _node(self, node: onnx.NodeProto, index: int) -> None:
        step = _step(node, index)
        if step.op == "Constant" and node.domain in _DOMAINS:
            self._keep(step.outputs[0], _constant(step), step.outputs[0])
            return
        if node.domain not in _DOMAINS or not (step.op in OPS or step.op in LAYERS):
            raise _unknown(node, step)
        for name in step.inputs[1:] if step.op == "Resize" else ():
            self._to_host(name)
        if step.op in OPS and all(not name or name in self.constants for name in step.inputs):
            self._fold(step)
        else:
            self.steps.append(step)

    def _to_host(self, name: str) -> None:
        """Scales are floats that decide a shape."""
        value = self.constants.get(name)
        if isinstance(value, Tensor):
            self.constants[name] = value.numpy()

    def _fold(self, step: Step) -> None:
        inputs = tuple(self.constants[name] if name else None for name in step.inputs)
        with torch.no_grad():
            results = evaluate(step, inputs, self.module.opset)
        origins = [self.names[n] for n in step.inputs if n and isinstance(self.constants[n], Tensor)]
        for name, value in zip(step.outputs, results, strict=False):
            self._keep(name, value, origins[0] if origins else name)

    def _join_biases(self) -> None:
        """MatMul by a constant matrix, then Add of a constant row: one linear."""
        uses = Counter(name for step in self.steps for name in step.inputs)
        makers = {name: i for i, step in enumerate(self.steps) for name in step.outputs}
        for index, step in enumerate(self.steps):
            for value, bias in (step.inputs, step.inputs[::-1]) if step.op == "Add" else ():
                maker = makers.get(value)
                if maker is None or uses[value] != 1 or not self._takes_bias(self.steps[maker], bias):
                    continue
                product = self.steps[maker]
                self.steps[maker] = replace(product, inputs=(*product.inputs, bias), outputs=step.outputs)
                self.steps[index] = replace(step, op="")
                makers[step.outputs[0]] = maker
                break
        self.steps = [step for step in self.steps if step.op]

    def _takes_bias(self, step: Step, bias: str) -> bool:
        weight, row = matrix(step, self.constants), self.constants.get(bias)
        if weight is None or len(step.inputs) != 2 or not isinstance(row, Tensor):
            return False
        return step.outputs[0] not in self.module.outputs and row.shape[-1:] == weight.shape[1:] == (
            row.numel(),
        )

    def _with_layer(self, step: Step) -> Step:
        layer = LAYERS[step.op](step, self.constants) if step.op in LAYERS else None
        if layer is None:
            return step
        owner, _, name = layer_path(self.names[step.inputs[1]], step).rpartition(".")
        place = container(self.module, owner)
        name = unique(place, name)
        place.add_module(name, layer)
        return replace(step, layer=f"{owner}.{name}" if owner else name, inputs=step.inputs[:1])

    def _register_constants(self) -> None:
        """What the remaining steps and the outputs read: host values, parameters, buffers."""
        read = {name for step in self.steps for name in step.inputs} | set(self.module.outputs)
        for name, value in self.constants.items():
            if name in read and isinstance(value, Tensor):
                self.module.named[name] = self._register(clean(self.names[name]), value)
            elif name in read:
                self.module.host[name] = value  # type: ignore[assignment]

    def _register(self, path: str, value: Tensor) -> str:
        owner, _, name = path.rpartition(".")
        place = container(self.module, owner)
        name = unique(place, name)
        if value.is_floating_point():
            place.register_parameter(name, nn.Parameter(value.contiguous(), requires_grad=False))
        else:
            place.register_buffer(name, value)
        return f"{owner}.{name}" if owner else name


def _unknown(node: onnx.NodeProto, step: Step) -> UnsupportedOperator:
    if any(word in step.op for word in _QUANTIZED):
        return UnsupportedOperator(
            f"{step.label} cannot be imported: the file is already quantised", "give the float model"
        )
    domain = f"{node.domain}." if node.domain else ""
    return UnsupportedOperator(
        f"{domain}{step.label} cannot be imported: no such operator here",
        "give the model's source (timm:, hf:, torchvision:, file.py:FACTORY) instead",
    )


def _step(node: onnx.NodeProto, index: int) -> Step:
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    attributes = {k: _array(v) if isinstance(v, onnx.TensorProto) else v for k, v in attributes.items()}
    name = node.name or (node.output[0] if node.output else str(index))
    scope = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), "")
    inputs = tuple(node.input)
    while inputs and not inputs[-1]:
        inputs = inputs[:-1]
    return Step(node.op_type, f"{node.op_type} {name}", inputs, tuple(node.output), attributes, scope)


def _constant(step: Step) -> Host:
    given: Mapping[str, Any] = step.attributes
    value = next((given[name] for name in _CONSTANT if name in given), None)
    if value is None:
        raise UnsupportedOperator(f"{step.label} cannot be imported: a sparse or text constant")
    array = np.asarray(value)
    return array.astype({"f": np.float32, "i": np.int64}.get(array.dtype.kind, array.dtype))


def _array(tensor: onnx.TensorProto) -> Host:
    """A tensor's values; half and double become float32, as the graph is computed in it."""
    array = numpy_helper.to_array(tensor)
    _, kept = TYPES.get(tensor.data_type, (None, None))
    if kept is None:
        raise UnsupportedOperator(
            f"{tensor.name} has element type {tensor.data_type}, which cannot be imported"
        )
    values: npt.NDArray[Any] = array.astype(kept, copy=False)
    return values


def _placed(value: Value) -> Value:
    """Scalars and small integers on the host, everything else as a tensor."""
    if isinstance(value, Tensor):
        small = value.numel() == 1 or (not value.is_floating_point() and value.numel() <= _SMALL)
        return value.numpy() if small else value
    small = value.size == 1 or (value.dtype.kind != "f" and value.size <= _SMALL)
    return value if small else as_tensor(value)
