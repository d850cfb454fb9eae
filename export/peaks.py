"""The largest absolute value of every float tensor of an ONNX graph over some images.

One number a tensor, reduced inside the graph, so that memory does not grow with the network: an `Abs`
and a `ReduceMax` beside each tensor, run by ONNX Runtime without graph optimisation. What it is for:
finding where FP16 overflows, and symmetric min-max scales for products of two activations.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from vit_export.artifacts import Images, Logits
from vit_export.errors import MissingExtra, NumericsError

_SUFFIX = "/vit_export.peak"


def measure_peaks(model: ir.Model, batches: Iterable[Images], threads: int = 0) -> Mapping[str, float]:
    """max |x| by tensor name over all `batches` (float32 NCHW); graph inputs and constants excluded.

    Raises NumericsError naming the first tensor that was NaN or Inf, MissingExtra without ONNX Runtime.
    """
    source = model.graph.inputs[0].name
    with TemporaryDirectory() as folder:
        path = Path(folder) / "watched.onnx"
        watched = model.clone()
        names = _watch(watched.graph)
        ir.save(watched, path, external_data="watched.data")
        session = _session(path, threads)
        peaks = np.zeros(len(names), np.float32)
        for images in batches:
            seen = np.asarray(session.run([name + _SUFFIX for name in names], {source: images}))
            _check_finite(names, seen)
            peaks = np.maximum(peaks, seen)
    return dict(zip(names, peaks.tolist(), strict=True))


def batches(model: ir.Model, images: Images) -> Iterator[Images]:
    """`images` in steps of the graph's own batch, one at a time where it is free; the last one filled up."""
    shape = model.graph.inputs[0].shape
    step = shape[0] if shape is not None and isinstance(shape[0], int) else 1
    for start in range(0, len(images), step):
        part = images[start : start + step]
        yield np.concatenate([part, np.repeat(part[-1:], step - len(part), axis=0)])


def run_graph(path: Path, images: Images, threads: int = 0, *, rounded: bool = False) -> Logits:
    """The first output of an ONNX file on float32 NCHW images, in ONNX Runtime without optimisation.

    rounded: store every float16 tensor in float16, as a GPU does. ONNX Runtime's CPU provider computes
    float16 nodes in float32 and keeps float32 from one such node to the next.
    """
    if rounded:
        with TemporaryDirectory() as folder:
            return run_graph(save_rounded(path, Path(folder) / "rounded.onnx"), images, threads)
    session = _session(path, threads)
    logits: Logits = session.run(None, {session.get_inputs()[0].name: images})[0]
    return logits


def save_rounded(path: Path, copy: Path) -> Path:
    """Write an ONNX file to `copy` so that ONNX Runtime stores every float16 tensor in float16."""
    model = ir.load(path)
    _round_halves(model.graph)
    ir.save(model, copy, external_data=f"{copy.name}.data")
    return copy


def _round_halves(graph: ir.Graph) -> None:
    """Put two Identities behind every float16 tensor: those run in float16, so it must be stored in it.

    One would not do: the runtime takes a single float16 node between others to float32 with them.
    """
    for node in list(graph):
        for value in node.outputs:
            if value.dtype == ir.DataType.FLOAT16 and node.op_type != "Identity":
                readers = list(value.uses())
                once = ir.node("Identity", [value])
                once.outputs[0].type = value.type
                stored = ir.node("Identity", [once.outputs[0]])
                stored.outputs[0].type = value.type
                graph.insert_after(node, [once, stored])
                for reader, index in readers:
                    reader.replace_input_with(index, stored.outputs[0])


def _session(path: Path, threads: int) -> Any:
    """A session that runs the nodes as they are written, not what a runtime would make of them."""
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise MissingExtra("onnxruntime", "onnxruntime") from error
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _watch(graph: ir.Graph) -> list[str]:
    """Add a peak output for every float tensor a node produces; their names in execution order."""
    names = []
    for node in list(graph):
        for value in node.outputs:
            if value.dtype != ir.DataType.FLOAT or value.name is None:
                continue
            size = ir.node("Abs", [value])
            peak = ir.node("ReduceMax", [size.outputs[0]], attributes={"keepdims": 0})
            peak.outputs[0].name = value.name + _SUFFIX
            peak.outputs[0].dtype, peak.outputs[0].shape = ir.DataType.FLOAT, ir.Shape([])
            graph.insert_after(node, [size, peak])
            graph.outputs.append(peak.outputs[0])
            names.append(value.name)
    return names


def _check_finite(names: list[str], seen: npt.NDArray[np.float32]) -> None:
    bad = np.flatnonzero(~np.isfinite(seen))
    if len(bad):
        raise NumericsError(
            f"{names[bad[0]]} is NaN or Inf in FP32",
            "the model or its input is broken before any conversion; check the checkpoint and --mean, --std",
        )
