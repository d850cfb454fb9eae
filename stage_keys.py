"""What decides each stage's result, in one place: a stage is reused only if all of this is the same.

Every key holds the stage's own inputs by content, the source code of the packages that do the work, and the
versions of the libraries that decide bytes. Time, paths and the number of processes decide nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from vit_export.artifacts import Program, Runnable
from vit_export.data import DIGITS_VIT_WEIGHTS
from vit_export.models import DEFAULT
from vit_export.python310 import sha256_of
from vit_export.runtime.environment import PACKAGES, cpu_features, cpu_name, physical_cores, versions
from vit_export.store import Key

if TYPE_CHECKING:
    from torch import Tensor

    from vit_export.models.config import LoadOptions

_ROOT = Path(__file__).parent
_CHIPS = (Path("/proc/driver/nvidia/version"), Path("/proc/device-tree/model"))
_GPUS = Path("/proc/driver/nvidia/gpus")
_STAGES = ("models", "calibration", "search", "export", "runtime")
_TORCH = ("numpy", "torch")
_LOADERS = ("torch", "torchvision", "timm", "transformers", "onnx", "onnx-ir")
_ONNX = (*_TORCH, "onnx", "onnxscript", "onnx-ir")

# stage → (modules whose code decides it, packages whose versions decide it)
_DECIDED_BY: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "pixels": (("artifacts.py", "calibration"), ("numpy", "pillow")),
    "calibrate": (("artifacts.py", "build_size.py", "calibration", "export", "search"), _TORCH),
    "baseline": (("artifacts.py", "models", "export"), _TORCH),
    "in torch": (("artifacts.py", "export", "search"), _TORCH),
    "native": (("artifacts.py", "models", "search"), _LOADERS),
    # a whole task of a sweep: whatever may reach it
    "cell": (
        (
            "artifacts.py",
            "blame_size.py",
            "build_size.py",
            "check_size.py",
            "job.py",
            "kept_cost.py",
            "one_size.py",
            "pipeline.py",
            "stages.py",
            "sweep/tasks.py",
            *_STAGES,
        ),
        PACKAGES,
    ),
    "build": (
        ("artifacts.py", "build_size.py", "export"),
        (*_ONNX, "onnxruntime", "openvino", "coremltools", "tensorrt", "tensorrt-rtx"),
    ),
    "evaluate": (
        ("artifacts.py", "runtime"),
        (*_TORCH, "onnxruntime", "openvino", "coremltools", "tensorrt", "tensorrt-rtx"),
    ),
}


def key(stage: str, **inputs: object) -> Key:
    """The key of a stage with these inputs: text as it is, everything else by the hash of its content."""
    code, packages = _DECIDED_BY[stage]
    given = {name: value if isinstance(value, str) else digest(value) for name, value in inputs.items()}
    used = {f"version of {name}": version for name, version in versions(packages).items()}
    return Key(stage, {**given, **used, "code": code_digest(code)})


def digest(value: object) -> str:
    """SHA-256 of a value: dataclasses and containers as JSON, arrays and existing files by their bytes."""
    content = msgspec.json.encode(value, enc_hook=_plain, order="sorted")
    return hashlib.sha256(type(value).__name__.encode() + b"\0" + content).hexdigest()


def machine() -> str:
    """The processor, which decides the kernels a runtime picks and so the last bits of its outputs."""
    return " ".join((cpu_name(), *cpu_features()))


def chips() -> str:
    """The NVIDIA GPUs and driver, or the Jetson, that an engine would be built for; empty without any."""
    files = [*_CHIPS, *sorted(_GPUS.glob("*/information"))]
    return "".join(file.read_text(errors="replace") for file in files if file.is_file())


@cache
def code_digest(parts: tuple[str, ...]) -> str:
    """SHA-256 of our own modules: an edit or another version never meets results of the one before."""
    total = hashlib.sha256()
    for part in parts:
        path = _ROOT / part
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            total.update(f"{file.relative_to(_ROOT).as_posix()}\0".encode())
            total.update(file.read_bytes())
    return total.hexdigest()


def program_digest(program: Program) -> str:
    """SHA-256 of a traced model: both graphs, every weight, what its layers are called and its batch."""
    total = hashlib.sha256()
    facts = (program.layers, program.image_size, program.dynamic_batch, program.batch_size)
    total.update(msgspec.json.encode(facts))
    total.update(str(program.graph.graph).encode())
    total.update(tensors_digest(_tensors(program)).encode())
    total.update(str(program.source.graph).encode())
    return total.hexdigest()


def tensors_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of named tensors, in their order."""
    total = hashlib.sha256()
    for name, tensor in tensors:
        total.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(_bytes()).numpy().data)
    return total.hexdigest()


def source_digest(spec: str, options: LoadOptions) -> str:
    """SHA-256 of a model's files and versions without loading it; empty where files do not tell.

    Empty for a user's own .py (it may import anything) and for what is downloaded: those are loaded to know
    what they are.
    """
    if options.pretrained or ".py:" in spec or options.trust_remote_code:
        return ""
    path = DIGITS_VIT_WEIGHTS if spec == DEFAULT else Path(spec.removeprefix("hf:"))
    if spec.startswith("hf:") and not path.is_dir():
        return ""
    files = _content(path) if path.exists() else []
    return digest([spec if not files else "", *files, sorted(versions(_LOADERS).items())])


def runnable_digest(runnable: Runnable) -> str:
    """SHA-256 of an artifact's files and of how it is opened, its thread count included."""
    threads = runnable.threads or physical_cores()
    return digest([runnable.runner, threads, runnable.options, *_content(runnable.path)])


def _content(path: Path) -> Iterable[tuple[str, str]]:
    """(name, hash) of a package's files, or of a file and those beside it with its stem (`model.bin`)."""
    if path.is_dir():
        return [(file.relative_to(path).as_posix(), sha256_of(file)) for file in _files(path)]
    beside = sorted(file for file in path.parent.glob(f"{path.stem}.*") if file.is_file())
    return [(file.name, sha256_of(file)) for file in beside]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _tensors(program: Program) -> list[tuple[str, Tensor]]:
    """All constants of both graphs by name; those of the source that the graph shares appear twice."""
    found = {**program.graph.state_dict(), **program.source.state_dict, **program.source.constants}
    for node in program.graph.graph.find_nodes(op="get_attr"):
        value: Any = program.graph
        for part in node.target.split("."):
            value = getattr(value, part)
        found[f"graph {node.target}"] = value
    return sorted((name, value) for name, value in found.items() if hasattr(value, "dtype"))


def _bytes() -> Any:
    import torch

    return torch.uint8


def _plain(value: object) -> object:
    """What JSON does not know: a file stands for its content, an array for its bytes."""
    if isinstance(value, Path):
        return sha256_of(value) if value.is_file() else str(value)
    if isinstance(value, np.ndarray):
        return [str(value.dtype), list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a stage cannot depend on a {type(value).__name__}")
