"""The JSON beside a TensorRT graph: what was built, from what, and how to build it again elsewhere.

Schema vit-export.tensorrt/1:
```
{"schema", "graph": "model.onnx", "graph_sha256", "input": {"name", "size": [H, W], "batch": N | null},
 "options": {TensorRtOptions}, "engine": "model.engine" | null, "reason",
 "module": "tensorrt" | "tensorrt_rtx", "version", "compute_capabilities", "unavailable_capabilities",
 "warnings": [...], "int8_layers": [...], "commands": {"TensorRT 10": "trtexec ...", ...}, "seconds"}
```
`graph` and `engine` are names in the manifest's own folder, which can therefore be moved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from vit_export.artifacts import Size
from vit_export.errors import InputError, UntrustedInput
from vit_export.export.trt_options import TensorRtOptions
from vit_export.python310 import sha256_of

SCHEMA = "vit-export.tensorrt/1"


@dataclass(frozen=True, slots=True)
class GraphInput:
    """The one input of a graph, float32 [batch, 3, height, width]. batch: None where it is dynamic."""

    name: str
    size: Size
    batch: int | None = None

    def shape(self, batch: int) -> tuple[int, int, int, int]:
        """NCHW for so many images."""
        return (batch, 3, *self.size)

    @staticmethod
    def of(graph: Path) -> GraphInput:
        """Read from an ONNX file; needs the onnx package. Raises InputError for any other signature."""
        import onnx

        inputs = onnx.load(graph, load_external_data=False).graph.input
        dims = list(inputs[0].type.tensor_type.shape.dim) if len(inputs) == 1 else []
        if len(dims) != 4 or not all(dim.dim_value > 0 for dim in dims[1:]) or dims[1].dim_value != 3:
            raise InputError(f"{graph} does not take one [batch, 3, height, width] tensor of fixed size")
        batch = dims[0].dim_value if dims[0].HasField("dim_value") else None
        return GraphInput(inputs[0].name, (dims[2].dim_value, dims[3].dim_value), batch)


@dataclass(frozen=True, slots=True)
class EngineBuild:
    """What a build left in the graph's folder.

    engine: None where none could be built; `reason` then says why, and `manifest` is what the device
        builds from. warnings: of parser and builder. capabilities: chips an RTX engine was built for,
    unavailable: those asked for that this SDK has no name for. int8_layers: modules whose product the
        graph quantises, for the runner to look up in the engine. seconds: of the whole build.
    """

    manifest: Path
    graph: Path
    input: GraphInput
    options: TensorRtOptions
    commands: Mapping[str, str] = field(default_factory=dict)
    engine: Path | None = None
    reason: str = ""
    module: str = ""
    version: str = ""
    capabilities: tuple[str, ...] = ()
    unavailable: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    int8_layers: tuple[str, ...] = ()
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """The manifest's content."""
        return {
            "schema": SCHEMA,
            "graph": self.graph.name,
            "graph_sha256": sha256_of(self.graph),
            "input": asdict(self.input),
            "options": asdict(self.options),
            "engine": self.engine.name if self.engine else None,
            "reason": self.reason,
            "module": self.module,
            "version": self.version,
            "compute_capabilities": self.capabilities,
            "unavailable_capabilities": self.unavailable,
            "warnings": self.warnings,
            "int8_layers": self.int8_layers,
            "commands": dict(self.commands),
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True, slots=True)
class StoredBuild:
    """The part of a manifest that another machine builds from."""

    graph: Path
    input: GraphInput
    options: TensorRtOptions
    int8_layers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Stored:
    """The keys of the JSON that a build needs."""

    schema: Literal["vit-export.tensorrt/1"]
    graph: str
    graph_sha256: str
    input: GraphInput
    options: TensorRtOptions
    int8_layers: tuple[str, ...] = ()


def manifest_path(graph: Path) -> Path:
    """`model.onnx` → `model.trt.json`."""
    return graph.with_suffix(".trt.json")


def read_request(manifest: Path) -> StoredBuild:
    """Read a manifest and check that its graph is the one it was written for.

    Raises InputError when it is not a manifest or the graph differs, UntrustedInput when the graph
    would lie outside the manifest's folder.
    """
    try:
        stored = msgspec.json.decode(manifest.read_bytes(), type=_Stored)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{manifest} is not a TensorRT manifest ({error})") from error
    graph = manifest.parent / stored.graph
    if graph.name != stored.graph:
        raise UntrustedInput(f"{manifest} names a graph outside its folder: {stored.graph}")
    if not graph.is_file() or sha256_of(graph) != stored.graph_sha256:
        raise InputError(f"{graph} is not the graph {manifest.name} was written for", "copy the folder again")
    return StoredBuild(graph, stored.input, stored.options, stored.int8_layers)
