"""A one-layer classifier as ONNX: what the TensorRT runner's tests run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from vit_export.artifacts import Images, Logits

SIZE = (4, 6)  # not square, so that swapped sides are noticed
CLASSES = 5


def _weights() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    features = 3 * SIZE[0] * SIZE[1]
    return rng.standard_normal((features, CLASSES), np.float32), rng.standard_normal(CLASSES, np.float32)


def linear_logits(images: Images) -> Logits:
    """What the linear model answers."""
    weight, bias = _weights()
    return images.reshape(len(images), -1) @ weight + bias


def save_linear(path: Path, batch: int | None) -> Path:
    """A classifier of one layer as ONNX: float32 [N, 3, 4, 6] to [N, 5]."""
    weight, bias = _weights()
    dim = batch if batch is not None else "batch"
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["images"], ["flat"], name="Flatten"),
            helper.make_node("Gemm", ["flat", "head.weight", "head.bias"], ["logits"], name="head/Gemm"),
        ],
        "linear",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [dim, 3, *SIZE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [dim, CLASSES])],
        [numpy_helper.from_array(weight, "head.weight"), numpy_helper.from_array(bias, "head.bias")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, path)
    return path
