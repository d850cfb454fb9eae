"""Core ML: one .mlpackage for iPhone, iPad and Mac, or one for several image sizes that share weights."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vit_export.artifacts import BuildRequest, BuiltArtifact, Precision, Program, Runnable, TargetProfile
from vit_export.errors import UsageError
from vit_export.export.coreml_options import CoreMLOptions
from vit_export.export.target import Target


class CoreMLTarget(Target):
    """`model.mlpackage` (an ML program); fp16 and int8 compute in fp16, inputs and outputs are float32."""

    name, package, extra = "coreml", "coremltools", "coreml"
    weights = ("int8", "int4")

    def profile(self, precision: Precision, options: Mapping[str, Any]) -> TargetProfile:
        """Activations of linears in uint8 with a zero point, unless asked otherwise.

        Convolutions stay fp16: the patch embedding has 2 % of a ViT's products, and eight bits of an image
        cost DINOv2-S 2 dB. Where only weights are quantised, theirs are too.
        """
        wanted = CoreMLOptions.of(options)
        return TargetProfile(
            activations=wanted.activations,
            opset=0,  # no ONNX on the way
            attention="fused",
            convolutions="int8" if wanted.weights else "float",
            rest="float32" if precision is Precision.FP32 else "float16",
        )

    def _build(self, program: Program, request: BuildRequest) -> tuple[Path, Mapping[str, Any]]:
        from vit_export.export.child import in_child
        from vit_export.export.coreml_convert import Conversion, write_package
        from vit_export.export.coreml_graph import float_groups, prepared
        from vit_export.export.coreml_metadata import facts
        from vit_export.export.program import save_decomposed

        options = CoreMLOptions.of(request.options)
        if request.precision is Precision.FP32:  # stays exact: what the others are compared with
            options = replace(options, palettize=0, weights=None)
        batch = request.batch_size or 1
        if options.input == "image" and batch != 1:
            raise UsageError("a Core ML package that takes images has batch 1", "use --coreml-input tensor")
        source, path = request.folder / "source.pt2", request.folder / "model.mlpackage"
        lowered, grouped = float_groups(program) if options.weights == "int4" else (program, ())
        save_decomposed(prepared(lowered, options, request.preprocessing), batch, source)
        asked = Conversion(
            request.precision, batch, program.image_size, request.preprocessing, options,
            name=request.metadata.get("model", "Vision Transformer"),
            channels={layer.weight: layer.shape[0] for layer in program.layers},
            grouped=grouped,
            user_defined=facts(program, request),
        )  # fmt: skip
        convert = in_child(write_package, timeout=request.timeout, what="the Core ML conversion")
        compression = convert(source, path, asked)
        source.unlink()
        details: dict[str, Any] = {
            "deployment_target": options.target,
            "input": options.input,
            "labels": bool(options.labels),
        }
        if options.palettize or request.precision is Precision.INT8:
            details |= {"palettize": options.palettize, **asdict(compression)}
        return path, details

    def runnable(self, artifact: BuiltArtifact, threads: int) -> Runnable:
        """Apple's runtime on macOS, elsewhere the reference interpreter."""
        function = artifact.details.get("function")
        return Runnable("coreml", artifact.path, threads, {"function": function} if function else {})

    def not_timed(self) -> str:
        """Only a Mac runs Core ML; the reference interpreter that stands in elsewhere has no speed."""
        if sys.platform == "darwin":
            return ""
        return "Core ML speed is only measurable on a Mac (reference interpreter, not Apple's runtime)"

    def notes(self, artifact: BuiltArtifact) -> tuple[str, ...]:
        """What the package takes, and what of its weights is compressed."""
        facts = artifact.details
        takes = "an RGB image, normalised inside" if facts["input"] == "image" else "a float32 tensor"
        gives = " and is a classifier" if facts["labels"] else ""
        lines = [f"opens on {_SYSTEMS[facts['deployment_target']]} and later, takes {takes}{gives}"]
        if "weights" in facts:
            lines.append(_compressed(facts))
        return tuple(lines)

    def shares(self, artifacts: Sequence[BuiltArtifact]) -> bool:
        """For several sizes, from iOS 18 on, and not for classifiers: Core ML has no such functions."""
        facts = [artifact.details for artifact in artifacts]
        return len(facts) > 1 and not any(
            fact["labels"] or fact["deployment_target"] == "iOS17" for fact in facts
        )

    def share(
        self, artifacts: Sequence[BuiltArtifact], folder: Path, *, timeout: float = 600.0
    ) -> tuple[BuiltArtifact, ...]:
        """One package with a function a size, `size_224x224`, weights shared; the first is the default."""
        from vit_export.export.child import in_child
        from vit_export.export.coreml_functions import combine

        names = [f"size_{height}x{width}" for height, width in (a.image_size for a in artifacts)]
        together = in_child(combine, timeout=timeout, what="sharing weights in one Core ML package")
        path = together({name: a.path for name, a in zip(names, artifacts, strict=True)}, folder)
        return tuple(
            replace(
                artifact,
                path=path,
                size_bytes=self._size(path),
                details={**artifact.details, "function": name},
            )
            for name, artifact in zip(names, artifacts, strict=True)
        )


_SYSTEMS = {"iOS17": "iOS 17, macOS 14", "iOS18": "iOS 18, macOS 15"}


def _compressed(facts: Mapping[str, Any]) -> str:
    """`49 of 50 weights are int8; left float: head; never compressed: pos_embed (feeds add)`."""
    kind = f"have {facts['palettize']}-bit palettes" if facts["palettize"] else "are quantised"
    parts = [f"{facts['compressed_weights']} of {facts['weights']} weights {kind}"]
    if facts["float_weights"]:
        parts.append(f"left float: {', '.join(facts['float_weights'])}")
    if facts["float_constants"]:
        named = (f"{name} (feeds {used})" for name, used in facts["float_constants"].items())
        parts.append(f"never compressed: {', '.join(named)}")
    return "; ".join(parts)
