"""Palettes and four-bit blocks for weights, and the count of what a saved package really compresses.

Only weights of linears and convolutions are compressed, each named to coremltools: a configuration for a
whole model would also take the position table and Swin's bias tables, which is where accuracy goes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vit_export.export.coreml_options import CoreMLOptions

GROUP = 32  # output channels that share a palette, iOS 18
BLOCK = 32  # columns that share a scale of four-bit weights
HALF = "_to_fp16"  # what MIL adds to the name of a constant it makes fp16
SMALLEST = 2048  # elements; below, a palette or scales save nothing (coremltools' own threshold)
_FLOATS = (10, 11)  # MIL.proto: FLOAT16, FLOAT32
_WEIGHTS = {"linear": ("weight",), "conv": ("weight",), "matmul": ("x", "y")}  # operation: parameters


@dataclass(frozen=True, slots=True)
class Compression:
    """What a package compresses of the weights of its linears and convolutions.

    float_weights: names of those that stay float. float_constants: other large float tensors (position
    and bias tables) → the operation they feed; these are never compressed.
    """

    compressed_weights: int
    weights: int
    float_weights: tuple[str, ...]
    float_constants: Mapping[str, str]


def palettes(weights: Mapping[str, int], options: CoreMLOptions) -> Any:
    """coremltools' configuration that gives each weight a palette of 2^bits values, and nothing else.

    weights: MIL's name of a constant → output channels. One palette for every GROUP channels where target
    and layer allow it, else one a weight; values by k-means, which in one dimension finds the optimum.
    """
    import coremltools.optimize.coreml as cto

    def config(channels: int) -> Any:
        grouped = options.target != "iOS17" and channels % GROUP == 0
        return cto.OpPalettizerConfig(
            mode="kmeans",
            nbits=options.palettize,
            granularity="per_grouped_channel" if grouped else "per_tensor",
            group_size=GROUP if grouped else 0,
            weight_threshold=SMALLEST,
        )

    return cto.OptimizationConfig(
        op_name_configs={
            name + suffix: config(channels) for name, channels in weights.items() for suffix in ("", HALF)
        }
    )


def blocks(weights: Iterable[str]) -> Any:
    """coremltools' configuration that stores these weights in four bits, a scale for every BLOCK columns.

    They must lie on such a grid already (export/quantize.py): nothing is rounded anew but codes that their
    block's largest value left out.
    """
    import coremltools.optimize.coreml as cto

    block = cto.OpLinearQuantizerConfig(
        mode="linear_symmetric", dtype="int4", granularity="per_block", block_size=BLOCK, weight_threshold=0
    )
    return cto.OptimizationConfig(
        op_name_configs={name + suffix: block for name in weights for suffix in ("", HALF)}
    )


def count(spec: Any, names: Mapping[str, str]) -> Compression:
    """Read from a saved specification; `names`: MIL's name of a constant → fully qualified name."""
    decompressed: set[str] = set()
    sizes: dict[str, int] = {}
    weights: set[str] = set()
    users: dict[str, str] = {}
    for operation in _operations(spec):
        if operation.type.startswith("constexpr_"):
            decompressed.add(operation.outputs[0].name)
        elif operation.type == "const":
            sizes[operation.outputs[0].name] = _float_elements(operation)
        else:
            for parameter, argument in operation.inputs.items():
                used = {binding.name for binding in argument.arguments}
                users.update(dict.fromkeys(used, operation.type))
                if parameter in _WEIGHTS.get(operation.type, ()):
                    weights |= used & (decompressed | sizes.keys())
    large = {name for name, size in sizes.items() if size >= SMALLEST and name in users} - weights
    return Compression(
        compressed_weights=len(weights & decompressed),
        weights=len(weights),
        float_weights=tuple(sorted(_named(name, names) for name in weights - decompressed)),
        float_constants={_named(name, names): users[name] for name in sorted(large)},
    )


def _operations(spec: Any) -> Iterator[Any]:
    for function in spec.mlProgram.functions.values():
        yield from function.block_specializations[function.opset].operations


def _float_elements(operation: Any) -> int:
    """Elements of a float constant in the weight file; 0 for any other constant."""
    value = operation.attributes["val"]
    tensor = value.type.tensorType
    if value.WhichOneof("value") != "blobFileValue" or tensor.dataType not in _FLOATS:
        return 0
    return math.prod(dimension.constant.size for dimension in tensor.dimensions)


def _named(constant: str, names: Mapping[str, str]) -> str:
    """The module path (of a weight) or full name (of another tensor) behind MIL's name."""
    stem = constant.removesuffix(HALF)
    return names.get(stem, stem).removesuffix(".weight")
