"""TensorRT: one ONNX graph whose tensor types are the precision, and an engine where one can be built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from vit_export.artifacts import BuildRequest, BuiltArtifact, Precision, Program, Runnable, TargetProfile
from vit_export.errors import UsageError
from vit_export.export import trt_notes
from vit_export.export.target import Target
from vit_export.export.trt_options import TensorRtOptions
from vit_export.export.trt_sdk import why_not_here


class TensorRtTarget(Target):
    """`model.onnx`, `model.trt.json` and, where TensorRT can build here, `model.engine`.

    The graph is what every TensorRT takes: opset 20 with attention written out (TensorRT fuses it
    itself; 10.3 knows no Attention operator), symmetric int8 with zero point 0, float16 for all the
    rest. details["not_built"] says why there is no engine, "" when there is one.

    Options: `trt_` and a field of TensorRtOptions (`trt_flavor`, `trt_batches`, ...), `int8_attention`.
    """

    name, package, extra = "tensorrt", "onnx_ir", "export"

    def profile(self, precision: Precision, options: Mapping[str, Any]) -> TargetProfile:
        """Symmetric int8; the rest float16, else int8 layers would be slower than FP16 ones."""
        opset = int(options.get("opset") or 20)
        return TargetProfile(
            activations="symmetric",
            opset=opset,
            attention="fused" if opset >= 23 else "decomposed",
            rest="float32" if precision is Precision.FP32 else "float16",
        )

    def _build(self, program: Program, request: BuildRequest) -> tuple[Path, Mapping[str, Any]]:
        from vit_export.export.child import in_child
        from vit_export.export.onnx_attention import tidy_attention
        from vit_export.export.onnx_graph import INPUT, save, to_onnx
        from vit_export.export.trt_build import build_engine
        from vit_export.export.trt_graph import int8_layers, strongly_typed
        from vit_export.export.trt_manifest import GraphInput

        options = _options(request.options)
        profile = self.profile(request.precision, {"opset": request.opset})
        model = to_onnx(program, profile, batch_size=request.batch_size)
        tidy_attention(model)
        facts = strongly_typed(
            model,
            request.precision,
            request.samples,
            request.options.get("int8_attention", "auto"),
        )
        model.metadata_props.update(request.metadata)
        graph = request.folder / "model.onnx"
        save(model, graph)
        batch = request.batch_size if program.dynamic_batch else program.batch_size
        source = GraphInput(INPUT, program.image_size, batch)
        build = in_child(build_engine, timeout=request.timeout, what="the TensorRT build")
        built = build(graph, source, options, int8_layers=int8_layers(model))
        details = {
            "opset": model.opset_imports[""],
            "nodes": model.graph.num_nodes(),
            **facts,
            "ranges_from": request.samples_are,
            "not_built": built.reason,
            "builder": f"{built.module} {built.version}".strip(),
            "build_seconds": round(built.seconds, 2),
            "compute_capabilities": list(built.capabilities),
            "unavailable_capabilities": list(built.unavailable),
            "warnings": list(built.warnings),
            "commands": dict(built.commands),
        }
        return built.engine or graph, details

    def _size(self, path: Path) -> int:
        """Bytes of the engine, or of the graph with its weights: the other is in the same folder."""
        return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))

    def runnable(self, artifact: BuiltArtifact, threads: int) -> Runnable:
        """Runs in TensorRT on this machine's GPU."""
        return Runnable("tensorrt", artifact.path, threads)

    def lowered(self, artifact: BuiltArtifact, threads: int, work: Path) -> Runnable:
        """The graph the engine was (or will be) built from, in ONNX Runtime as it is written.

        With every float16 tensor rounded, as a GPU stores it: ONNX Runtime's CPU provider alone keeps
        float32 from one float16 node to the next.
        """
        from vit_export.export.peaks import save_rounded

        graph = artifact.path.with_suffix(".onnx")
        if artifact.precision is not Precision.FP32:
            height, width = artifact.image_size
            graph = save_rounded(graph, work / f"tensorrt-{artifact.precision}-{height}x{width}.onnx")
        return Runnable("onnx", graph, threads, {"optimization": "none"})

    def notes(self, artifact: BuiltArtifact) -> tuple[str, ...]:
        """What was built for which chips, what stays float, and the vendor's command lines for it."""
        return trt_notes.sentences(artifact.details)

    def not_run(self) -> str:
        """Without a GPU, its driver and an SDK no engine can run here."""
        return why_not_here()


def _options(options: Mapping[str, Any]) -> TensorRtOptions:
    """The options named `trt_...`; the others are other targets' or the graph's."""
    given = {name.removeprefix("trt_"): value for name, value in options.items() if name.startswith("trt_")}
    unknown = set(given) - {field.name for field in fields(TensorRtOptions)}
    if unknown:
        raise UsageError(f"target tensorrt has no option trt_{', trt_'.join(sorted(unknown))}")
    return TensorRtOptions(**given)
