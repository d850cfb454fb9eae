"""`path/model.onnx`: a float ONNX file as a torch module; the file itself stays the baseline."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import onnx
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import inliner
from torch import Tensor, nn

from vit_export.artifacts import LoadedModel, Size
from vit_export.errors import InputError, ParityError, UntrustedInput, UsageError, VitExportError
from vit_export.models.config import LoadOptions
from vit_export.models.finish import assumed, finish
from vit_export.models.onnx_build import build

OPSETS = range(11, 24)
PARITY = 1e-4  # largest |difference| over largest |value| between the file and its import
HALF_PARITY = 1e-2  # the same for a file with float16 weights, which is imported in float32
MAX_PIXELS = 1 << 26  # of a batch
_DEFAULT_SIDE = 224  # where height and width are symbolic


def load(name: str, options: LoadOptions) -> LoadedModel:
    """Import the graph; its numbers are compared with ONNX Runtime on the file where that is installed.

    Raises InputError for a broken file or one that takes no image, UnsupportedOperator naming a node
    that cannot be imported, ParityError when the import computes something else.
    """
    path = Path(name)
    if options.checkpoint or options.num_classes is not None:
        raise UsageError(
            f"{name} brings its own weights and classes", "leave out --checkpoint, --num-classes"
        )
    model = _read(path)
    size, batch, said = _input(model, path)
    half = any(t.data_type == onnx.TensorProto.FLOAT16 for t in model.graph.initializer)
    try:
        module = build(model)
        images = torch.randn(batch or 1, 3, *size, generator=torch.Generator().manual_seed(0))
        compared = _compare(module, images, path, HALF_PARITY if half else PARITY)
    except VitExportError:
        raise
    except Exception as error:  # the checker lets through graphs that no runtime can compute
        reason = (str(error).strip().splitlines() or [""])[0][:300]
        raise InputError(f"{path} cannot be imported: {type(error).__name__}: {reason}") from error
    preprocessing, guessed = assumed(options)
    loaded = finish(
        module,
        family="onnx graph",
        preprocessing=preprocessing,
        options=options,
        size=size,
        batch=batch or 2,
        notes=(compared, *said, *guessed),
    )
    return replace(loaded, baseline_path=path)


def _read(path: Path) -> onnx.ModelProto:
    if not path.is_file():
        raise InputError(f"no file at {path}")
    try:
        model = onnx.load(path)
        onnx.checker.check_model(path)
        model = inliner.inline_local_functions(model)
    except (DecodeError, onnx.checker.ValidationError, ValueError, OSError, RuntimeError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} is not a valid ONNX file: {reason}") from error
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if opset not in OPSETS:
        raise InputError(
            f"{path} has opset {opset}; {OPSETS[0]} to {OPSETS[-1]} can be imported",
            "convert it with onnx.version_converter",
        )
    return model


def _input(model: onnx.ModelProto, path: Path) -> tuple[Size, int | None, tuple[str, ...]]:
    """(height, width), the batch (None where it is dynamic), and what had to be assumed."""
    constants = {t.name for t in model.graph.initializer}
    inputs = [i for i in model.graph.input if i.name not in constants]
    dims = [d.dim_value or None for d in inputs[0].type.tensor_type.shape.dim] if inputs else []
    image = len(inputs) == 1 and inputs[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    if not image or len(dims) != 4 or dims[1] not in (3, None):
        taken = ", ".join(f"{i.name} {_shape(i)}" for i in inputs)
        raise InputError(f"{path} must take one float32 image [batch, 3, height, width]; it takes {taken}")
    size = (dims[2] or _DEFAULT_SIDE, dims[3] or _DEFAULT_SIDE)
    if min(size) < 1 or not 0 < (dims[0] or 1) * size[0] * size[1] <= MAX_PIXELS:
        raise UntrustedInput(
            f"{path} takes images of {_shape(inputs[0])}", f"a batch may have {MAX_PIXELS} pixels"
        )
    open_size = dims[2] is None or dims[3] is None
    said = (f"height and width are symbolic in the file: {size[0]}x{size[1]} taken",) if open_size else ()
    return size, dims[0], said


def _compare(module: nn.Module, images: Tensor, path: Path, tolerance: float) -> str:
    """Run both on the same images, every output; says how close they are."""
    if find_spec("onnxruntime") is None:
        return "the import was not compared with the file: onnxruntime is not installed"
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    theirs = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        result = module(images)
    ours = list(result.values()) if isinstance(result, dict) else [result]
    worst = max(_difference(torch.from_numpy(a), b) for a, b in zip(theirs, ours, strict=True))
    if not worst < tolerance:
        raise ParityError(f"{path} was imported wrongly: it differs from ONNX Runtime by {worst:.1e}")
    return f"imported from ONNX, {worst:.1e} from ONNX Runtime on the file"


def _difference(reference: Tensor, other: Tensor) -> float:
    reference = reference.float()
    return float((reference - other).abs().max() / reference.abs().max().clamp_min(1e-12))


def _shape(value: onnx.ValueInfoProto) -> str:
    dims = value.type.tensor_type.shape.dim
    return "[" + ", ".join(str(d.dim_value or d.dim_param or "?") for d in dims) + "]"
