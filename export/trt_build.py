"""Engines from one strongly typed ONNX graph: TensorRT 10.3 and later, and TensorRT-RTX.

Precision is decided by the graph (FP16 tensors, explicit symmetric Q/DQ), so nothing here depends on
the flags TensorRT 11 removed. Where no engine can be built (no SDK, no GPU) the graph and a manifest
are left, and `rebuild` on the device does the rest. Imports neither torch nor onnx.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vit_export.errors import InputError, MissingExtra, UsageError
from vit_export.export.trt_commands import commands
from vit_export.export.trt_errors import explain, not_a_graph, parse_failure
from vit_export.export.trt_manifest import EngineBuild, GraphInput, manifest_path, read_request
from vit_export.export.trt_options import RTX_CAPABILITIES, FlavorName, TensorRtOptions
from vit_export.export.trt_sdk import NoDevice, Sdk, load

_ON_DEVICE = "vit-export verify builds and runs it on the device"
_COMPATIBILITY = {"none": "NONE", "ampere+": "AMPERE_PLUS", "same": "SAME_COMPUTE_CAPABILITY"}


def build_engine(
    graph: Path,
    source: GraphInput,
    options: TensorRtOptions | None = None,
    *,
    int8_layers: tuple[str, ...] = (),
) -> EngineBuild:
    """Build an ONNX graph (one input, one output) to `.engine` beside it, with a `.trt.json` manifest.

    Without TensorRT, or with TensorRT but without a GPU, the manifest alone is written and its `reason`
    is set; asking for `rtx` where it is not installed raises MissingExtra. Raises UnsupportedOperator,
    naming the module, when parser or builder refuse the graph; UsageError for an option this SDK lacks.
    """
    options = options or TensorRtOptions()
    if not graph.is_file():
        raise InputError(f"{graph} is not a file")
    target = graph.with_suffix(".engine")
    build = EngineBuild(manifest_path(graph), graph, source, options, int8_layers=int8_layers)
    started = time.perf_counter()
    try:
        build = _build(load(options.flavor), build, target)
    except MissingExtra as error:
        if options.flavor == "rtx":
            raise
        build = replace(build, reason=f"{error.message} on this machine; {_ON_DEVICE}")
    except NoDevice as error:
        build = replace(build, reason=f"{error.message}; {_ON_DEVICE}")
    chips = build.capabilities or RTX_CAPABILITIES
    lines = commands(graph.name, target.name, source, options, chips)
    build = replace(build, commands=lines, seconds=time.perf_counter() - started)
    _write_whole(build.manifest, json.dumps(build.as_json(), indent=1).encode() + b"\n")
    return build


def rebuild(manifest: Path, flavor: FlavorName = "auto") -> EngineBuild:
    """Build on this machine what another could only prepare (or built for other chips)."""
    request = read_request(manifest)
    options = replace(request.options, flavor=flavor)
    return build_engine(request.graph, request.input, options, int8_layers=request.int8_layers)


def _build(sdk: Sdk, build: EngineBuild, target: Path) -> EngineBuild:
    """Parse, configure, build and save; every SDK object dies with this frame."""
    trt, options = sdk.trt, build.options
    sdk.messages.clear()
    builder = sdk.builder()
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, sdk.logger)
    if not parser.parse_from_file(str(build.graph)):
        raise parse_failure(parser, build.graph, sdk.product)
    if network.num_inputs != 1 or network.num_outputs != 1:
        raise not_a_graph(build.graph, sdk.product)
    config = builder.create_builder_config()
    _configure(sdk, builder, config, options)
    _set_profile(builder, network, config, build)
    taken, unavailable = _set_capabilities(sdk, config, options)
    _serialize(sdk, builder, network, config, build, target)
    return replace(
        build,
        engine=target,
        module=sdk.flavor.module,
        version=sdk.version,
        capabilities=taken,
        unavailable=unavailable,
        warnings=sdk.texts("WARNING"),
    )


def _serialize(sdk: Sdk, builder: Any, network: Any, config: Any, build: EngineBuild, target: Path) -> None:
    """Build and write the engine, with a timing cache beside it that the next build starts from."""
    cache = target.with_suffix(".timing")
    cached = build.options.timing_cache and sdk.flavor.name != "rtx"
    if cached:
        _load_timing_cache(config, cache)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        said = next(iter(sdk.texts("ERROR", "INTERNAL_ERROR")), "it gave no reason")
        raise explain(said, operator="", node="", graph=build.graph, product=sdk.product)
    _write_whole(target, plan)
    if cached:
        _write_whole(cache, config.get_timing_cache().serialize())


def _configure(sdk: Sdk, builder: Any, config: Any, options: TensorRtOptions) -> None:
    """Everything of the options that is not a shape, a chip or a cache."""
    trt = sdk.trt
    config.builder_optimization_level = options.optimization_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # names layers to the engine inspector
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    (config.set_flag if options.tf32 else config.clear_flag)(trt.BuilderFlag.TF32)
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):  # RTX: else no CUDA graph can be captured
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    for wanted, apply in _OPTIONAL:
        if wanted(options):
            apply(sdk, builder, config, options)


def _compatibility(sdk: Sdk, builder: Any, config: Any, options: TensorRtOptions) -> None:
    level = getattr(sdk.trt.HardwareCompatibilityLevel, _COMPATIBILITY[options.compatibility], None)
    if level is None:
        raise UsageError(
            f"{sdk.product} {sdk.version} has no hardware compatibility '{options.compatibility}'",
            "ask for ampere+, or use TensorRT 10.9 or later",
        )
    config.hardware_compatibility_level = level


def _version_compatible(sdk: Sdk, builder: Any, config: Any, options: TensorRtOptions) -> None:
    if sdk.flavor.name == "rtx":  # its packages carry no lean runtime to embed; the build would fail late
        raise UsageError("TensorRT-RTX builds no version-compatible engines", "use --trt-flavor tensorrt")
    config.set_flag(sdk.trt.BuilderFlag.VERSION_COMPATIBLE)


def _dla(sdk: Sdk, builder: Any, config: Any, options: TensorRtOptions) -> None:
    if builder.num_DLA_cores <= (options.dla_core or 0):
        raise UsageError(
            f"{sdk.product} {sdk.version} sees {builder.num_DLA_cores} DLA cores here, none numbered "
            f"{options.dla_core}",
            "DLA is in TensorRT up to 10.7 and from 11.4.1, on Jetson Orin; build without it elsewhere",
        )
    config.default_device_type = sdk.trt.DeviceType.DLA
    config.DLA_core = options.dla_core
    config.set_flag(sdk.trt.BuilderFlag.GPU_FALLBACK)


_Apply = Callable[[Sdk, Any, Any, TensorRtOptions], None]
_OPTIONAL: tuple[tuple[Callable[[TensorRtOptions], bool], _Apply], ...] = (
    (lambda options: options.compatibility != "none", _compatibility),
    (lambda options: options.version_compatible, _version_compatible),
    (lambda options: options.dla_core is not None, _dla),
)


def _set_profile(builder: Any, network: Any, config: Any, build: EngineBuild) -> None:
    """One optimisation profile over the batch; a graph of fixed batch needs none."""
    if build.input.batch is not None:
        return
    shapes = [build.input.shape(batch) for batch in build.options.batches]
    profile = builder.create_optimization_profile()
    profile.set_shape(network.get_input(0).name, *shapes)
    config.add_optimization_profile(profile)


def _set_capabilities(
    sdk: Sdk, config: Any, options: TensorRtOptions
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(taken, unavailable) compute capabilities. Only RTX chooses chips; others build for the one present."""
    if not hasattr(config, "set_compute_capability"):
        return (), ()
    known: Mapping[str, Any] = sdk.trt.ComputeCapability.__members__
    names = {wanted: f"SM{wanted.replace('.', '')}" for wanted in options.compute_capabilities}
    taken = tuple(wanted for wanted, name in names.items() if name in known)
    if not taken:
        raise UsageError(
            f"{sdk.product} {sdk.version} builds for none of {', '.join(names)}",
            "it knows " + ", ".join(n[2:-1] + "." + n[-1] for n in known if n.startswith("SM")),
        )
    config.num_compute_capabilities = len(taken)
    for index, wanted in enumerate(taken):
        config.set_compute_capability(known[names[wanted]], index)
    return taken, tuple(wanted for wanted in names if wanted not in taken)


def _load_timing_cache(config: Any, path: Path) -> None:
    """Attach the cache of an earlier build; one of another GPU or version is dropped for a new one."""
    stored = path.read_bytes() if path.is_file() else b""
    if not config.set_timing_cache(config.create_timing_cache(stored), ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def _write_whole(path: Path, data: Any) -> None:
    """Write bytes or an SDK buffer under a temporary name, then rename: no half-written artifact."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(data)
    part.replace(path)
