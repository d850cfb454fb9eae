"""Linears whose weight alone is quantised, as com.microsoft.MatMulNBits.

ONNX Runtime runs the operator as it is; OpenVINO reads it as the decompression that its CPU plugin fuses into
the product. Weights are stored as unsigned codes around 2^(bits - 1) in blocks of columns with a scale each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from vit_export.export.onnx_edit import add_initializer, constant
from vit_export.export.onnx_integer import CONTRIB, added_bias, done, put

BLOCK = 32  # columns of a block; the operator knows powers of two from 16 on
FLOAT, INTEGER = 1, 4  # its accuracy levels: products in float32, or of activations quantised as they come


@dataclass(frozen=True, slots=True)
class _Stored:
    """codes: int8 [out, in]; scales: float32 [out, groups]; bits: of a code."""

    name: str
    codes: npt.NDArray[np.generic]
    scales: npt.NDArray[np.generic]
    bits: int


def weight_products(model: ir.Model, accuracy: int) -> int:
    """Write each product with a dequantised weight as one MatMulNBits with its bias; how many.

    accuracy: the operator's level. INTEGER quantises activations in the same blocks while it runs: no
    calibrated range, and outliers cost only their block.
    """
    count = 0
    for node in list(model.graph):
        stored = _stored(node.inputs[1]) if node.op_type == "MatMul" and not node.domain else None
        if stored is None:
            continue
        rows, columns = stored.codes.shape
        bias, last = added_bias(model, node, rows)
        attributes = {
            "K": columns, "N": rows, "bits": stored.bits, "block_size": BLOCK, "accuracy_level": accuracy,
        }  # fmt: skip
        inputs = [node.inputs[0], *_operands(model, stored), None, None, bias]
        put(last, ir.node("MatMulNBits", inputs, attributes, domain=CONTRIB))
        count += 1
    return done(model, count)


def _operands(model: ir.Model, stored: _Stored) -> tuple[ir.Value, ir.Value]:
    """(codes uint8 [out, blocks, bytes], scales float32 [out * blocks]); a byte's low half comes first."""
    known = [model.graph.initializers.get(f"{stored.name}.{part}") for part in ("codes", "scales")]
    if known[0] is not None and known[1] is not None:
        return known[0], known[1]
    rows, columns = stored.codes.shape
    blocks = -(-columns // BLOCK)
    codes = np.full((rows, blocks * BLOCK), 1 << (stored.bits - 1), np.uint8)
    codes[:, :columns] += stored.codes.astype(np.uint8)  # wraps: -1 + 128 is 127
    codes = codes.reshape(rows, blocks, BLOCK)
    if stored.bits == 4:
        codes = codes[..., 0::2] | codes[..., 1::2] << 4
    scales = stored.scales.repeat(blocks // stored.scales.shape[1], axis=1).astype(np.float32)
    return (
        add_initializer(model, f"{stored.name}.codes", codes),
        add_initializer(model, f"{stored.name}.scales", np.ascontiguousarray(scales.reshape(-1))),
    )


def _stored(value: ir.Value | None) -> _Stored | None:
    """The weight behind the right side of a product [in, out], its codes in as few bits as hold them."""
    node = value.producer() if value is not None else None
    turned = node is not None and node.op_type == "Transpose"
    node = _maker(node) if node is not None and turned else node
    shape = None
    if node is not None and node.op_type == "Reshape":
        shape, node = constant(node.inputs[1]), _maker(node)
    if node is None or node.op_type != "DequantizeLinear" or node.inputs[0] is None:
        return None
    codes, scales = constant(node.inputs[0]), constant(node.inputs[1])
    if codes is None or scales is None or codes.dtype != np.int8 or (shape is not None and not turned):
        return None
    name = str(node.inputs[0].name)
    if shape is not None:
        codes = codes.reshape([int(side) for side in shape])
    codes = codes if turned else codes.T
    return _Stored(name, codes, scales.reshape(len(codes), -1), 4 if abs(codes).max() <= 7 else 8)


def _maker(node: ir.Node) -> ir.Node | None:
    return node.inputs[0].producer() if node.inputs[0] is not None else None
