"""What an engine is made of: which layers meant to be int8 are not.

TensorRT's engine inspector lists fused layers with the ONNX nodes each came from and the data types of
its inputs. A module whose product was quantised, but whose engine layer reads no int8, fell back. The
JSON differs between versions: 10 writes `Format/Datatype`, 11 splits it into `Format` and `DataType`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

_TYPE_KEYS = ("Format/Datatype", "DataType", "Datatype", "Format")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_PRODUCTS = ("MatMul", "Gemm", "Conv")


def engine_layers(trt: Any, engine: Any) -> tuple[Mapping[str, Any], ...]:
    """The inspector's layers; () when the engine was built without detailed profiling verbosity."""
    inspector = engine.create_engine_inspector()
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    layers = json.loads(text).get("Layers", []) if text else []
    return tuple(layer for layer in layers if isinstance(layer, dict))


def int8_fallbacks(layers: Iterable[Mapping[str, Any]], wanted: Iterable[str]) -> tuple[str, ...]:
    """Modules of `wanted` (`blocks.3.attn.proj`) whose product runs in some layer, but in none on int8.

    A module that no layer names is left out: nothing is known of it.
    """
    seen: set[str] = set()
    integer: set[str] = set()
    for layer in layers:
        modules = set(_modules(layer))
        seen |= modules
        if reads_int8(layer):
            integer |= modules
    return tuple(name for name in wanted if name in seen and name not in integer)


def reads_int8(layer: Mapping[str, Any]) -> bool:
    """Whether an engine layer computes on int8: by the types of its inputs, or by its kernel's name."""
    inputs = [tensor for tensor in layer.get("Inputs", ()) if isinstance(tensor, dict)]
    types = " ".join(str(tensor.get(key, "")) for tensor in inputs for key in _TYPE_KEYS).lower()
    return "int8" in types or "i8i8" in str(layer.get("TacticName", ""))


def _modules(layer: Mapping[str, Any]) -> Iterator[str]:
    """Module paths of the products (MatMul, Gemm, Conv) that a layer came from."""
    source = f"{layer.get('Metadata', '')}"
    nodes = _NODE.findall(source) or str(layer.get("Name", "")).split(" + ")
    for node in nodes:
        path, _, operator = node.strip().rpartition("/")
        if path and operator.startswith(_PRODUCTS):
            yield path.strip("/").replace("/", ".")
