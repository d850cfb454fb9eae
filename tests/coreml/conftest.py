"""Packages for the Core ML tests: written by coremltools itself, read by ours."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vit_export.export import child

logging.getLogger("coremltools").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="coremltools")
ct = pytest.importorskip("coremltools")


@pytest.fixture(scope="module", autouse=True)
def conversion_stays_here() -> Iterator[None]:
    """Conversions run in this process: a child would import torch and coremltools for each of the packages.

    The child itself: tests/store/test_child.py, test_vendor_crash.py; whole exports through it: tests/cli.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(child, "in_child", lambda step, **_: step)
        yield


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
