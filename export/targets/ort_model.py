"""ONNX Runtime: a standard ONNX file with Q/DQ that its CPU provider fuses to integer products."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vit_export.artifacts import BuildRequest, BuiltArtifact, Precision, Program, Runnable, TargetProfile
from vit_export.export.target import Target


class OrtTarget(Target):
    """`model.onnx`, opset 23 by default: one Attention and one Gelu node each."""

    name, package, extra = "onnx", "onnx", "export"

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
        from vit_export.export.onnx_graph import save, to_onnx
        from vit_export.export.onnx_kernels import integer_kernels

        profile = self.profile(request.precision, {"opset": request.opset})
        model = to_onnx(program, profile, batch_size=request.batch_size)
        if profile.rest == "float16":
            from vit_export.export.to_float16 import to_float16

            to_float16(model)
        model.metadata_props.update(request.metadata)
        path = request.folder / "model.onnx"
        save(model, path)
        details: dict[str, Any] = {"opset": model.opset_imports[""], "nodes": model.graph.num_nodes()}
        if request.precision is Precision.INT8:
            details |= integer_kernels(path)
        return path, details

    def runnable(self, artifact: BuiltArtifact, threads: int) -> Runnable:
        """Runs in ONNX Runtime's CPU provider with all optimisations."""
        return Runnable("onnx", artifact.path, threads)

    def lowered(self, artifact: BuiltArtifact, threads: int, work: Path) -> Runnable | None:
        """The file as written, node by node."""
        return Runnable("onnx", artifact.path, threads, {"optimization": "none"})
