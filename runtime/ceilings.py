"""`python -m vit_export.runtime.ceilings THREADS`: how many products a second this machine reaches.

One product of two square matrices in each arithmetic, by a runtime that comes close to what the processor
can do (measured on an AVX512-VNNI machine: OpenVINO 101 / 219 / 437 and torch 96 / 213 / 433 GMAC/s in
fp32 / bf16 / int8). It runs in a process of its own, so that its threads disturb nothing, takes about two
seconds and prints a JSON object: the runtime, and GMAC/s by arithmetic.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from vit_export.runtime.environment import cpu_features

SIDE = 2048  # of the matrices: large enough for full speed, small enough for half a second
SECONDS = 0.4  # of products for each arithmetic
_BF16_FEATURES = {"avx512-bf16", "amx-bf16", "bf16"}  # without one bfloat16 is emulated: no ceiling

Product = Callable[[], object]


def openvino_products(threads: int) -> Iterator[tuple[str, Product]]:
    """(arithmetic, one product) as OpenVINO compiles it."""
    import openvino
    from openvino import opset13 as ops

    core = openvino.Core()
    able = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    left, right = _operands()
    codes = ops.constant(np.clip(right * 30, -127, 127).astype(np.int8))
    scaled = ops.multiply(ops.convert(codes, "f32"), ops.constant(np.full((1, SIDE), 1 / 30, np.float32)))
    for arithmetic, needs in (("fp32", "FP32"), ("bf16", "BF16"), ("int8", "INT8")):
        if needs not in able:
            continue
        given = ops.parameter([SIDE, SIDE], np.float32)
        low, high = np.float32(-4), np.float32(4)
        if arithmetic == "int8":
            result = ops.matmul(ops.fake_quantize(given, low, high, low, high, 256), scaled, False, False)
        else:
            result = ops.matmul(given, ops.constant(right), False, False)
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "bf16" if arithmetic == "bf16" else "f32",
        }
        model = openvino.Model([result], [given])
        request = core.compile_model(model, "CPU", settings).create_infer_request()
        yield arithmetic, partial(request.infer, [left], share_inputs=True, share_outputs=True)


def torch_products(threads: int) -> Iterator[tuple[str, Product]]:
    """(arithmetic, one product) as torch's oneDNN does it."""
    import torch

    torch.set_num_threads(threads)
    left, right = (torch.from_numpy(matrix) for matrix in _operands())
    yield "fp32", lambda: left @ right
    if _BF16_FEATURES & set(cpu_features()):
        a, b = left.bfloat16(), right.bfloat16()
        yield "bf16", lambda: a @ b
    c, d = ((matrix * 30).clamp(-127, 127).to(torch.int8) for matrix in (left, right))
    yield "int8", lambda: torch._int_mm(c, d)


# The first that is installed; ONNX Runtime has no way to make a graph without the onnx package.
PROBES: Mapping[str, Callable[[int], Iterator[tuple[str, Product]]]] = {
    "openvino": openvino_products,
    "torch": torch_products,
}


def measure(threads: int) -> dict[str, Any]:
    """{"runtime", "fp32", "bf16", "int8"}: GMAC/s of the best product; empty without any runtime."""
    package = next((name for name in PROBES if importlib.util.find_spec(name) is not None), None)
    if package is None:
        return {}
    found: dict[str, Any] = {"runtime": f"{package} {importlib.metadata.version(package)}"}
    for arithmetic, product in PROBES[package](threads):
        found[arithmetic] = round(SIDE**3 / _fastest(product) / 1e9, 1)
    return found


def _operands() -> tuple[Any, Any]:
    random = np.random.default_rng(0)
    return tuple(random.standard_normal((2, SIDE, SIDE), dtype=np.float32))


def _fastest(product: Product) -> float:
    """Seconds of the fastest call: a ceiling is what was reached, not what was usual."""
    product()
    best, end = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        began = time.perf_counter()
        product()
        best = min(best, time.perf_counter() - began)
    return best


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))
