"""What the TensorRT tests share: a GPU that is not there."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from contracts.trt_graphs import save_linear

SDK = Path(__file__).parent / "sdk"


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """`tensorrt` and `cuda.bindings` are the fakes in sdk/, here and in workers; yields the CUDA fake."""
    monkeypatch.syspath_prepend(SDK)
    monkeypatch.setenv("PYTHONPATH", str(SDK))
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if _replaced(name)}
    import cuda.bindings.runtime as fake

    yield fake
    for name in [name for name in sys.modules if _replaced(name)]:
        del sys.modules[name]
    sys.modules.update(hidden)


def _replaced(module: str) -> bool:
    return module.partition(".")[0] in ("cuda", "tensorrt")


@pytest.fixture
def make_engine(tmp_path: Path) -> Callable[..., Path]:
    """Writes a fake engine: `make_engine(batches=(1, 4, 8))`, `make_engine(batch=2)`, further JSON keys."""

    def make(
        batches: tuple[int, int, int] | None = (1, 4, 8), batch: int | None = None, **plan: object
    ) -> Path:
        graph = save_linear(tmp_path / f"linear{batch}.onnx", batch)
        path = tmp_path / f"model{len(list(tmp_path.glob('*.engine')))}.engine"
        path.write_text(json.dumps({"onnx": str(graph), "batches": batches, **plan}))
        return path

    return make
