"""Packages for the Core ML tests: written by coremltools itself, read by ours."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

logging.getLogger("coremltools").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="coremltools")
ct = pytest.importorskip("coremltools")


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Convert a MIL program or torch.export program, or take an MLModel, and save it as NAME.mlpackage."""

    def to_package(source: Any, name: str = "model", precision: str = "FLOAT32", **options: Any) -> Path:
        if not isinstance(source, ct.models.MLModel):
            source = ct.convert(
                source,
                convert_to="mlprogram",
                compute_precision=getattr(ct.precision, precision),
                skip_model_load=True,
                **{"minimum_deployment_target": ct.target.iOS18, **options},
            )
        path = tmp_path / f"{name}.mlpackage"
        source.save(str(path))
        return path

    return to_package
