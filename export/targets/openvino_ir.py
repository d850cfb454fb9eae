"""OpenVINO: an IR made from the same ONNX graph, run in int8 where it carries Q/DQ."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vit_export.artifacts import BuildRequest, BuiltArtifact, Precision, Program, Runnable, TargetProfile
from vit_export.errors import UsageError
from vit_export.export.target import Target

PRECISIONS = ("auto", "f32", "bf16", "f16")
PRODUCTS = ("balanced", "plain")  # of int8: shaped so that x86 threads share them evenly, or as they are


class OpenVinoTarget(Target):
    """`model.xml` and `model.bin`; fp16 stores weights in half, the CPU computes in float32."""

    name, package, extra = "openvino", "openvino", "openvino"
    weights = ("int8", "int4")

    def profile(self, precision: Precision, options: Mapping[str, Any]) -> TargetProfile:
        """Asymmetric uint8 activations; opset 20, whose plain attention OpenVINO fuses itself.

        Convolutions stay float: eight bits on the image cost DINOv2-S 2 dB and gave no speed.
        """
        return TargetProfile(
            activations="asymmetric",
            opset=int(options.get("opset") or 20),
            attention="decomposed",
            convolutions="float",
            rest="float16" if precision is Precision.FP16 else "float32",
        )

    def _build(self, program: Program, request: BuildRequest) -> tuple[Path, Mapping[str, Any]]:
        from vit_export.export.child import in_child
        from vit_export.export.onnx_attention import tidy_attention
        from vit_export.export.onnx_graph import save, to_onnx
        from vit_export.export.onnx_integer import drop_zero_points
        from vit_export.export.openvino_attention import keep_transposes_apart, spread_bias
        from vit_export.export.openvino_ir_file import write_ir
        from vit_export.export.pad_tokens import pad_tokens
        from vit_export.export.single_query import merge_single_query
        from vit_export.export.split_products import split_wide_products

        program = merge_single_query(program)
        details: dict[str, Any] = {}
        alone = request.options.get("weights") if request.precision is Precision.INT8 else None
        if request.precision is Precision.INT8 and not alone:
            details["products"] = _products(request)
            if details["products"] == "balanced":
                program = split_wide_products(pad_tokens(program))
        graph = to_onnx(
            program, self.profile(request.precision, {"opset": request.opset}), batch_size=request.batch_size
        )
        tidy_attention(graph)
        keep_transposes_apart(graph)
        spread_bias(graph)
        drop_zero_points(graph)
        if alone:
            from vit_export.export.onnx_weights import INTEGER, weight_products

            details |= {"weights_only": alone, "weight_products": weight_products(graph, INTEGER)}
        source, path = request.folder / "source.onnx", request.folder / "model.xml"
        save(graph, source)
        half = request.precision is Precision.FP16
        convert = in_child(write_ir, timeout=request.timeout, what="the OpenVINO conversion")
        convert(source, path, request.metadata, half)
        for left in request.folder.glob("source.onnx*"):
            left.unlink()
        return path, {
            **details,
            "nodes": graph.graph.num_nodes(),
            "opset": graph.opset_imports[""],
            "inference_precision": _rest(request),
        }

    def runnable(self, artifact: BuiltArtifact, threads: int) -> Runnable:
        """Runs on the CPU with the latency hint and the float type the artifact was built for."""
        rest = artifact.details.get("inference_precision", "f32")
        options = {"inference_precision": None if rest == "auto" else rest}
        return Runnable("openvino", artifact.path, threads, options)


def _products(request: BuildRequest) -> str:
    wanted = str(request.options.get("openvino_products") or PRODUCTS[0])
    if wanted not in PRODUCTS:
        raise UsageError(f"unknown --openvino-products {wanted!r}", f"one of {', '.join(PRODUCTS)}")
    return wanted


def _rest(request: BuildRequest) -> str:
    """Type of what is not integer: float32, as in the baseline; in int8 OpenVINO's choice (`auto`).

    That is bf16 on processors that have it, whose rounding is small beside that of eight bits.
    """
    wanted = request.options.get("openvino_precision")
    if wanted is None:
        return "auto" if request.precision is Precision.INT8 else "f32"
    if wanted not in PRECISIONS:
        raise UsageError(f"unknown --openvino-precision {wanted!r}", f"one of {', '.join(PRECISIONS)}")
    return str(wanted)
