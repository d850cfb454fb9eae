"""The vendor's own command lines that repeat a build, so that a user needs none of this package."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import PurePath

from vit_export.export.trt_manifest import GraphInput
from vit_export.export.trt_options import TensorRtOptions

_COMPATIBILITY = {"none": "none", "ampere+": "ampere+", "same": "sameComputeCapability"}


def commands(
    graph: str, engine: str, source: GraphInput, options: TensorRtOptions, capabilities: tuple[str, ...]
) -> Mapping[str, str]:
    """One line for `trtexec` of TensorRT 10, one of TensorRT 11, one for `tensorrt_rtx`, to be run in the
    artifact's folder. graph, engine: file names there.

    10 needs to be told that the graph decides precision; in 11 and RTX nothing else exists, and both
    refuse the precision flags of old (--fp16, --int8, --best).
    """
    files = [f"--onnx={graph}", f"--saveEngine={engine}"]
    shapes = _shapes(source, options) if source.batch is None else []
    tuned = [*shapes, *_builder_flags(options), *_trtexec_flags(engine, options), "--useCudaGraph"]
    rtx = [*files, *shapes, *_builder_flags(options)]
    chips = ",".join(c.replace(".", "") for c in capabilities)
    return {
        "TensorRT 10": shlex.join(["trtexec", *files, "--stronglyTyped", *tuned]),
        "TensorRT 11": shlex.join(["trtexec", *files, *tuned]),
        "TensorRT-RTX": shlex.join(["tensorrt_rtx", *rtx, f"--computeCapabilities={chips}"]),
    }


def _shapes(source: GraphInput, options: TensorRtOptions) -> list[str]:
    return [
        f"--{which}Shapes={source.name}:" + "x".join(map(str, source.shape(batch)))
        for which, batch in zip(("min", "opt", "max"), options.batches, strict=True)
    ]


def _builder_flags(options: TensorRtOptions) -> list[str]:
    flags = [f"--builderOptimizationLevel={options.optimization_level}"]
    if options.workspace_mib is not None:
        flags.append(f"--memPoolSize=workspace:{options.workspace_mib}")
    if not options.tf32:
        flags.append("--noTF32")
    return flags


def _trtexec_flags(engine: str, options: TensorRtOptions) -> list[str]:
    flags = []
    if options.timing_cache:
        flags.append(f"--timingCacheFile={PurePath(engine).with_suffix('.timing')}")
    if options.compatibility != "none":
        flags.append(f"--hardwareCompatibilityLevel={_COMPATIBILITY[options.compatibility]}")
    if options.version_compatible:
        flags.append("--versionCompatible")
    if options.dla_core is not None:
        flags += [f"--useDLACore={options.dla_core}", "--allowGPUFallback"]
    return flags
