"""Int8 for the two products inside attention, where TensorRT fuses it and the numbers allow it.

    softmax(Q Kᵀ) V  with  Q, K, V and the probabilities as symmetric int8 (zero point 0)

TensorRT's fused int8 attention kernels take at most 512 tokens (NVIDIA/TensorRT#3724) and heads of 16
to 64 channels; beyond that the Q/DQ pairs would break the FP16 fusion and cost time. And they cost
accuracy: one scale for probabilities that mostly lie near 1/tokens keeps few of their bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx_ir as ir

from vit_export.artifacts import Images, Logits
from vit_export.export.peaks import batches, run_graph

MAX_TOKENS = 512
ENOUGH_DB = 30.0  # int8 linears alone leave about 20 dB; attention may add a tenth of that noise


@dataclass(frozen=True, slots=True)
class Attention:
    """One attention written out: scores = Q Kᵀ, probabilities = softmax, context = probabilities V."""

    scores: ir.Node
    softmax: ir.Node
    context: ir.Node
    tokens: int
    channels: int

    @property
    def fusable(self) -> bool:
        """Whether TensorRT has an int8 kernel for it."""
        return self.tokens <= MAX_TOKENS and self.channels % 16 == 0 and 16 <= self.channels <= 64


def attentions(graph: ir.Graph) -> Iterator[Attention]:
    """Every softmax between two products of activations, with or without a bias on the scores."""
    for softmax in graph:
        if softmax.op_type != "Softmax" or softmax.inputs[0] is None:
            continue
        scores = _product_before(softmax.inputs[0])
        readers = list(softmax.outputs[0].consumers())
        if scores is None or len(readers) != 1 or readers[0].op_type != "MatMul":
            continue
        values = readers[0].inputs[1]
        if values is not None and values.shape is not None and len(values.shape) >= 2:
            tokens, channels = values.shape[-2], values.shape[-1]
            if isinstance(tokens, int) and isinstance(channels, int):
                yield Attention(scores, softmax, readers[0], tokens, channels)


def quantize_attention(model: ir.Model, peaks: Mapping[str, float], *, all_of_them: bool = False) -> int:
    """Put Q/DQ on the four inputs of each fusable attention, in place; how many were quantised.

    peaks: max |x| by tensor name; the scale is peak / 127. all_of_them: those TensorRT does not fuse too.
    """
    count = 0
    for attention in list(attentions(model.graph)):
        if attention.fusable or all_of_them:
            for node in (attention.scores, attention.context):
                for index in (0, 1):
                    _quantize_input(model.graph, node, index, peaks)
            count += 1
    return count


def agreement_db(reference: ir.Model, other: ir.Model, images: Images) -> float:
    """SQNR in dB of `other`'s outputs against `reference`'s on float32 NCHW images."""
    outputs: list[Logits] = []
    with TemporaryDirectory() as folder:
        for index, model in enumerate((reference, other)):
            path = Path(folder) / f"{index}.onnx"
            ir.save(model, path, external_data=f"{index}.data")
            outputs.append(np.concatenate([run_graph(path, part) for part in batches(model, images)]))
    signal = outputs[0].astype(np.float64)
    noise = float(((signal - outputs[1]) ** 2).sum())
    return float(10 * np.log10((signal**2).sum() / noise)) if noise else float("inf")


def _product_before(value: ir.Value) -> ir.Node | None:
    """The MatMul behind a softmax, through the addition of a bias or mask."""
    node = value.producer()
    if node is not None and node.op_type == "Add":
        sources = [v.producer() for v in node.inputs if v is not None]
        node = next((s for s in sources if s is not None and s.op_type == "MatMul"), None)
    return node if node is not None and node.op_type == "MatMul" else None


def _quantize_input(graph: ir.Graph, node: ir.Node, index: int, peaks: Mapping[str, float]) -> None:
    value = node.inputs[index]
    assert value is not None and value.name is not None
    name = f"{value.name}.int8"
    scale = _constant(graph, f"{name}.scale", np.float32(max(peaks[value.name], 1e-6) / 127))
    zero = _constant(graph, f"{name}.zero_point", np.int8(0))
    quantize = ir.node("QuantizeLinear", [value, scale, zero], name=f"{node.name}/QuantizeLinear_{index}")
    dequantize = ir.node(
        "DequantizeLinear", [quantize.outputs[0], scale, zero], name=f"{node.name}/DequantizeLinear_{index}"
    )
    for made, kind in ((quantize, ir.DataType.INT8), (dequantize, ir.DataType.FLOAT)):
        made.outputs[0].name = f"{made.name}:0"
        made.outputs[0].dtype, made.outputs[0].shape = kind, value.shape
    graph.insert_before(node, [quantize, dequantize])
    node.replace_input_with(index, dequantize.outputs[0])


def _constant(graph: ir.Graph, name: str, number: np.generic) -> ir.Value:
    if name not in graph.initializers:
        graph.register_initializer(ir.val(name, const_value=ir.tensor(np.asarray(number), name=name)))
    return graph.initializers[name]
