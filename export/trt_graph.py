"""The ONNX graph as TensorRT wants it: types, int8 attention where it pays, and what was quantised."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx_ir as ir

from vit_export.artifacts import TargetProfile
from vit_export.export.peaks import measure_peaks
from vit_export.export.to_float16 import to_float16
from vit_export.export.trt_errors import module_path

_PRODUCTS = ("MatMul", "Gemm", "Conv")


def strongly_typed(model: ir.Model, profile: TargetProfile, options: Mapping[str, Any]) -> dict[str, Any]:
    """Give every tensor the type it is computed in, in place; facts for the report.

    options["samples"]: some calibration images (float32 NCHW); with them float32 is left only where
    they show that float16 overflows, without them at every normalisation.
    """
    if profile.rest == "float32":
        return {}
    samples = options.get("samples")
    peaks = None if samples is None else peaks_of(model, samples)
    report = to_float16(model, peaks)
    return {"kept_float32": dict(report.kept), "saturated": list(report.saturated)}


def peaks_of(model: ir.Model, images: Any) -> Mapping[str, float]:
    """measure_peaks of a model in memory, one image at a time."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "float32.onnx"
        ir.save(model, path, external_data="float32.data")
        return measure_peaks(path, (images[i : i + 1] for i in range(len(images))))


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
