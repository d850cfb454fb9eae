"""OpenVINO: an IR made from the same ONNX graph, run in int8 where it carries Q/DQ."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vit_export.artifacts import BuildRequest, BuiltArtifact, Precision, Program, Runnable, TargetProfile
from vit_export.export.target import Target


class OpenVinoTarget(Target):
    """`model.xml` and `model.bin`; fp16 stores weights in half, the CPU computes in float32."""

    name, package, extra = "openvino", "openvino", "openvino"

    def profile(self, precision: Precision, options: Mapping[str, Any]) -> TargetProfile:
        """Asymmetric uint8 activations; opset 20, whose plain attention OpenVINO fuses itself."""
        return TargetProfile(
            activations="asymmetric",
            opset=int(options.get("opset") or 20),
            attention="decomposed",
            rest="float16" if precision is Precision.FP16 else "float32",
        )

    def _build(self, program: Program, request: BuildRequest) -> tuple[Path, Mapping[str, Any]]:
        from vit_export.export.child import in_child
        from vit_export.export.onnx_graph import save, to_onnx
        from vit_export.export.openvino_ir_file import write_ir

        graph = to_onnx(
            program, self.profile(request.precision, {"opset": request.opset}), batch_size=request.batch_size
        )
        source, path = request.folder / "source.onnx", request.folder / "model.xml"
        save(graph, source)
        half = request.precision is Precision.FP16
        convert = in_child(write_ir, timeout=request.timeout, what="the OpenVINO conversion")
        convert(source, path, request.metadata, half)
        for left in request.folder.glob("source.onnx*"):
            left.unlink()
        return path, {"nodes": graph.graph.num_nodes(), "opset": graph.opset_imports[""]}

    def runnable(self, artifact: BuiltArtifact, threads: int) -> Runnable:
        """Runs on the CPU with the latency hint; the float rest stays float32, as in the baseline."""
        return Runnable("openvino", artifact.path, threads)
