"""What TensorRT's parser and builder say, in words that name the module, the operator and the next step.

The parser names an ONNX node and quotes an assertion of its own source. Users think in modules
(`blocks.3.attn.proj`), so a node is traced to one: by its name, and for graphs of other tools, whose
names say little, by the nearest named neighbour.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vit_export.errors import TargetError, UnsupportedOperator

_EXPORT = "export it with vit-export"


@dataclass(frozen=True, slots=True)
class Refusal:
    """A known reason: `what` may use {op} and the pattern's groups, `hint` is the next step."""

    pattern: re.Pattern[str]
    what: str
    hint: str


def _refusal(pattern: str, what: str, hint: str) -> Refusal:
    return Refusal(re.compile(pattern, re.IGNORECASE | re.DOTALL), what, hint)


# Wording of onnx-tensorrt 10.0 to 11.4 and of TensorRT-RTX 1.7, most specific first.
REFUSALS = (
    _refusal(
        r"dequantizelinear.*\bint32\b|\bint32\b.*dequantizelinear",
        "DequantizeLinear on an int32 bias",
        f"the graph was quantised by another tool; {_EXPORT}, or keep biases float "
        "(ONNX Runtime: extra_options={'QuantizeBias': False})",
    ),
    _refusal(
        r"shiftIsAllZeros|zeroPointsAreAllZeros|non-?zero zero ?point|symmetric quantization",
        "{op} with a non-zero zero point",
        f"TensorRT takes symmetric int8 only; {_EXPORT}, or quantise to QInt8 with "
        "ActivationSymmetric and WeightSymmetric",
    ),
    _refusal(
        r"(?:Failed to import initializer|unsupported datatype).*initializer: (?P<name>\S+)",
        "initialiser {name} has a data type TensorRT does not have",
        f"{_EXPORT}; it writes float32, float16, int8 and int64 only",
    ),
    _refusal(
        r"^\S* UNSUPPORTED_NODE:|no importer|plugin not found",
        "operator {op} is not in this TensorRT",
        "TensorRT 10.3 (JetPack 6) takes opset 20 with attention written out: --opset 20",
    ),
    _refusal(
        r"must have (?:the )?same (?:input |data )?types?|types must match|type mismatch",
        "{op} mixes data types, which a strongly typed network does not convert",
        f"{_EXPORT}; it writes the casts",
    ),
    _refusal(
        r"Turing \(SM75\)|does not support.*SM ?75",
        "{op} has no kernel on Turing (compute capability 7.5)",
        "export with --fp16, or leave 7.5 out of the compute capabilities",
    ),
    _refusal(
        r"out ?of ?memory|insufficient.*memory|cudaMalloc",
        "not enough GPU memory to build",
        "lower the max batch, set a workspace limit, or build with nothing else on the GPU",
    ),
)


def parse_failure(parser: Any, graph: Path, product: str) -> TargetError:
    """The error for a graph the parser refused: the first thing it said, translated."""
    if parser.num_errors == 0:
        return not_a_graph(graph, product)
    refusal = parser.get_error(0)
    return explain(
        f"{refusal.code().name}: {' '.join(str(refusal.desc()).split())}",
        operator=str(refusal.node_operator()),
        node=str(refusal.node_name()),
        graph=graph,
        product=product,
    )


def not_a_graph(graph: Path, product: str) -> TargetError:
    """The error for a file without exactly one input and one output, such as one that is not ONNX."""
    return TargetError(
        f"{product} found no network with one input and one output in {graph}", f"is it ONNX? {_EXPORT}"
    )


def explain(said: str, operator: str, node: str, graph: Path, product: str) -> TargetError:
    """Translate one message. Unknown wording is passed on, first sentence only, with the node's place."""
    node = node or _quoted_node(said)
    for known in REFUSALS:
        if match := known.pattern.search(f"{operator} {said}"):
            values = match.groupdict()
            what = known.what.format(op=operator or "a node", **values)
            return _error(product, _place(graph, node or values.get("name", "")), what, known.hint)
    place = _place(graph, node)
    what = f"{operator}: {said[:200]}" if operator else said[:200]
    keep = f"keep it float (--keep-float '{place}')" if place else "try --fp32"
    return _error(product, place, what, f"{keep}, or report it with {graph.name}")


def _quoted_node(said: str) -> str:
    """The node a builder message quotes: `operation 'a/MatMul'`, `for node {ForeignNode[a/Add...b]}`."""
    found = re.search(
        r"operation '([^']+)'|for node \{?(?:ForeignNode\[)?([\w./]+?)(?:\.\.\.|[^\w./]|$)", said
    )
    return next((group for group in found.groups() if group), "") if found else ""


def _place(graph: Path, name: str) -> str:
    return module_path(name) or (_nearest(graph, name) if name else "") or name


def _error(product: str, place: str, what: str, hint: str) -> TargetError:
    return UnsupportedOperator(f"{product} refused {place} ({what})" if place else f"{product}: {what}", hint)


_SUFFIX = re.compile(
    r"(?:[._](?:weight|bias|scale|zero_point|quantized|QuantizeLinear|DequantizeLinear|Output|Input|\d+))+$"
)


def module_path(name: str) -> str:
    """The module a node or tensor name holds, or "" when it holds none.

    `/blocks.3/attn/proj/MatMul`                 → `blocks.3.attn.proj`  (torch.onnx, TorchScript)
    `blocks.3.attn.proj/MatMul`                  → `blocks.3.attn.proj`  (this exporter)
    `blocks.3.attn.proj.bias_DequantizeLinear`   → `blocks.3.attn.proj`  (a quantiser's initialiser)
    """
    if "/" in name:
        return ".".join(part for part in name.strip("/").split("/")[:-1] if part)
    stripped = _SUFFIX.sub("", name)
    return stripped if "." in stripped else ""


def _nearest(graph: Path, node: str, reach: int = 6) -> str:
    """Module path of the closest node at or after `node` (or its reader) whose name or constant holds one.

    Reads names only. "" without the onnx package (a device) or when nothing near is named.
    """
    try:
        import onnx
    except ImportError:
        return ""
    nodes = list(onnx.load(graph, load_external_data=False).graph.node)
    start = [n for n in nodes if n.name == node or node in n.input]
    for step in _downstream(nodes, start, reach):
        for name in (step.name, *step.input):
            if path := module_path(name):
                return path
    return ""


def _downstream(nodes: list[Any], start: list[Any], reach: int) -> Iterator[Any]:
    """`start` and what reads its outputs, breadth first, `reach` steps."""
    layer = start
    for _ in range(reach):
        yield from layer
        outputs = {name for n in layer for name in n.output}
        layer = [n for n in nodes if outputs.intersection(n.input)]
