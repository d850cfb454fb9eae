"""Counting what ONNX Runtime really runs in integers: by its own optimised graph, not by ours."""

from __future__ import annotations

import importlib.util
import tempfile
from collections import Counter
from pathlib import Path

_INTEGER = {
    "MatMulIntegerToFloat", "MatMulInteger", "QLinearMatMul", "QGemm", "DynamicQuantizeMatMul",
    "QAttention",
}  # fmt: skip
_FLOAT = {"MatMul", "Gemm", "FusedMatMul", "FusedGemm", "MatMulNBits"}


def integer_kernels(path: Path, joined: int = 0) -> dict[str, int]:
    """{"integer_linears": n, "float_linears": m}: products with a constant weight, after optimisation.

    joined: linears to add that share an operator with another, as queries, keys and values may.
    Empty without onnxruntime: a count that was not made is not reported.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        return {}
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        optimised = Path(folder) / "optimised.onnx"
        options.optimized_model_filepath = str(optimised)
        # Large models exceed one protobuf: keep weights in a side file, which the count never reads.
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", "optimised.data"
        )
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        graph = onnx.load(str(optimised), load_external_data=False).graph
    counts = _count(graph)
    return {**counts, "integer_linears": counts["integer_linears"] + joined}


def _count(graph: object) -> dict[str, int]:
    constants = {i.name for i in graph.initializer}  # type: ignore[attr-defined]
    for node in graph.node:  # type: ignore[attr-defined]
        if node.op_type in ("DequantizeLinear", "Constant") and all(i in constants for i in node.input if i):
            constants.update(node.output)
    kinds = Counter(
        node.op_type in _INTEGER
        for node in graph.node  # type: ignore[attr-defined]
        if node.op_type in _INTEGER | _FLOAT and any(i in constants for i in node.input)
    )
    return {"integer_linears": kinds[True], "float_linears": kinds[False]}
