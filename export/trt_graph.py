"""The ONNX graph as TensorRT wants it: types, int8 attention where it pays, and what was quantised."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import onnx_ir as ir

from vit_export.artifacts import Images, Precision
from vit_export.errors import UsageError
from vit_export.export.peaks import batches, measure_peaks
from vit_export.export.to_float16 import to_float16
from vit_export.export.trt_attention import ENOUGH_DB, agreement_db, attentions, quantize_attention
from vit_export.export.trt_errors import module_path
from vit_export.export.trt_options import choices

Int8Attention = Literal["auto", "on", "off"]
_PRODUCTS = ("MatMul", "Gemm", "Conv")


def strongly_typed(
    model: ir.Model, precision: Precision, samples: Images | None, int8_attention: Int8Attention
) -> dict[str, Any]:
    """Give every tensor the type it is computed in, in place; facts for the report.

    samples: some calibration images (float32 [n, 3, H, W]). With them float32 is left only where they
    show that float16 overflows, without them at every normalisation.
    """
    if precision is Precision.FP32:
        return {}
    peaks = None
    if samples is not None:
        peaks = measure_peaks(model, batches(model, samples))
    facts: dict[str, Any] = {}
    if precision is Precision.INT8:
        facts["int8_attention"] = _attention(model, peaks, samples, int8_attention)
    report = to_float16(model, peaks)
    return {**facts, "kept_float32": dict(report.kept), "saturated": list(report.saturated)}


def _attention(
    model: ir.Model, peaks: Mapping[str, float] | None, samples: Images | None, wanted: Int8Attention
) -> str:
    """Quantise attention as asked; in words what was done and why."""
    choices(wanted, Int8Attention, "--int8-attention")
    if wanted == "off":
        return "float16 (--int8-attention off)"
    if peaks is None or samples is None:
        if wanted == "on":
            raise UsageError("--int8-attention on needs calibration images", "give them with --calib")
        return "float16 (no calibration images to choose by)"
    if wanted == "on":
        return f"int8 in {quantize_attention(model, peaks, all_of_them=True)} blocks (--int8-attention on)"
    found = list(attentions(model.graph))
    if not any(attention.fusable for attention in found):
        tokens = max((attention.tokens for attention in found), default=0)
        return f"float16 (TensorRT fuses no int8 attention of {tokens} tokens)" if found else "none found"
    trial = model.clone()
    count = quantize_attention(trial, peaks)
    quality = agreement_db(model, trial, samples)
    if quality < ENOUGH_DB:
        return f"float16 (int8 would leave {quality:.1f} dB of {ENOUGH_DB:g})"
    quantize_attention(model, peaks)
    return f"int8 in {count} blocks ({quality:.1f} dB)"


def int8_layers(model: ir.Model) -> tuple[str, ...]:
    """Modules whose product reads two int8 tensors, in execution order."""
    return tuple(dict.fromkeys(_int8_modules(model.graph)))


def _int8_modules(graph: ir.Graph) -> Iterator[str]:
    for node in graph:
        if node.op_type in _PRODUCTS and all(_dequantized(value) for value in node.inputs[:2]):
            yield module_path(node.name or "")


def _dequantized(value: ir.Value | None) -> bool:
    """Whether a value comes from a DequantizeLinear, a Transpose or Cast in between or not."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in ("Transpose", "Cast", "Reshape"):
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    return node is not None and node.op_type == "DequantizeLinear"
