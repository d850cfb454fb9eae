"""ONNX Runtime: an ONNX file, in int8 with the integer operators that its CPU provider is fastest at."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_export.artifacts import (
    BuildRequest,
    BuiltArtifact,
    Images,
    Precision,
    Program,
    Runnable,
    TargetProfile,
)
from vit_export.errors import UsageError
from vit_export.export.target import Target

if TYPE_CHECKING:
    import onnx_ir as ir

OPERATORS = ("onnxruntime", "standard")  # of int8: its own fused ones, or Q/DQ that any runtime reads


class OrtTarget(Target):
    """`model.onnx`, opset 23 by default: one Attention and one Gelu node each."""

    name, package, extra = "onnx", "onnx", "export"
    weights = ("int8", "int4")

    def profile(self, precision: Precision, options: Mapping[str, Any]) -> TargetProfile:
        """Asymmetric uint8 activations; convolutions float, since QLinearConv must requantise."""
        return TargetProfile(
            activations="asymmetric",
            opset=int(options.get("opset") or 23),
            attention="fused",
            convolutions="float",
            rest="float16" if precision is Precision.FP16 else "float32",
        )

    def _build(self, program: Program, request: BuildRequest) -> tuple[Path, Mapping[str, Any]]:
        from vit_export.export.child import in_child
        from vit_export.export.onnx_graph import save, to_onnx
        from vit_export.export.onnx_kernels import integer_kernels
        from vit_export.export.single_query import merge_single_query

        profile = self.profile(request.precision, {"opset": request.opset})
        if profile.rest == "float32":
            program = merge_single_query(program)
        model = to_onnx(program, profile, batch_size=request.batch_size)
        details: dict[str, Any] = {"opset": model.opset_imports[""]}
        if profile.rest == "float16":
            from vit_export.export.to_float16 import to_float16

            report = to_float16(model, _overflowing(model, request.samples))
            details["kept_float32"] = dict(report.kept)
        alone = request.options.get("weights") if request.precision is Precision.INT8 else None
        if alone:
            from vit_export.export.onnx_weights import INTEGER, weight_products

            details |= {"weights_only": alone, "weight_products": weight_products(model, INTEGER)}
        elif request.precision is Precision.INT8:
            details["operators"] = _operators(request.options)
            if details["operators"] == "onnxruntime":
                _own_operators(model, details)
        model.metadata_props.update(request.metadata)
        path = request.folder / "model.onnx"
        save(model, path)
        details["nodes"] = model.graph.num_nodes()
        if request.precision is Precision.INT8 and not alone:
            count = in_child(integer_kernels, timeout=request.timeout, what="ONNX Runtime's optimisation")
            details |= count(path, details.pop("joined", 0))
        return path, details

    def runnable(self, artifact: BuiltArtifact, threads: int) -> Runnable:
        """Runs in ONNX Runtime's CPU provider with all optimisations."""
        return Runnable("onnx", artifact.path, threads)

    def lowered(self, artifact: BuiltArtifact, threads: int, work: Path) -> Runnable | None:
        """The file as written, node by node."""
        return Runnable("onnx", artifact.path, threads, {"optimization": "none"})


def _operators(options: Mapping[str, Any]) -> str:
    wanted = str(options.get("onnx_operators") or OPERATORS[0])
    if wanted not in OPERATORS:
        raise UsageError(f"unknown --onnx-operators {wanted!r}", f"one of {', '.join(OPERATORS)}")
    return wanted


def _own_operators(model: ir.Model, details: dict[str, Any]) -> None:
    """Write integer linears and their attention as ONNX Runtime's own operators, in place."""
    from vit_export.export.onnx_integer import drop_zero_points, integer_attention, integer_products

    drop_zero_points(model)
    integer_products(model)
    products = integer_attention(model)
    blocks = sum(node.op_type == "QAttention" for node in model.graph)
    details["fused_attention"] = blocks
    details["joined"] = products - blocks  # linears that share one operator's weight with another


def _overflowing(model: ir.Model, samples: Images | None) -> Mapping[str, float] | None:
    """max |x| by tensor where float16 would overflow on the samples, so that these nodes stay float32.

    None where it would not, or cannot be known for want of samples or of ONNX Runtime: then only the
    normalisations stay float32.
    """
    if samples is None or find_spec("onnxruntime") is None:
        return None
    from vit_export.export.float16_rewrite import HALF_MAX
    from vit_export.export.peaks import batches, measure_peaks

    peaks = measure_peaks(model, batches(model, samples))
    return peaks if max(peaks.values(), default=0.0) > HALF_MAX else None
