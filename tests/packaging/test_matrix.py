"""The ranges in pyproject.toml are those that `.ci/matrix` runs tests with."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

from packaging.requirements import Requirement

from vit_export.python310 import tomllib

ROOT = Path(__file__).resolve().parents[2]
TESTED = ("torch", "onnxruntime", "openvino", "coremltools", "transformers", "timm")
ELSEWHERE = (
    "tensorrt",
    "cuda-bindings",
    "tomli",
    "mkdocs-material",
    "vit-export",
)  # not from PyPI, or not here


def declared() -> dict[str, str]:
    """The lower bound of each package that a user of ours gets, for this Python."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {
        name: lines for name, lines in project["optional-dependencies"].items() if name not in ("test", "dev")
    }
    found = [Requirement(line) for lines in (project["dependencies"], *extras.values()) for line in lines]
    return {
        one.name: next(rule.version for rule in one.specifier if rule.operator == ">=")
        for one in found
        if one.name not in ELSEWHERE and (one.marker is None or one.marker.evaluate())
    }


def run() -> dict[str, str]:
    """The version of each package that a row named oldest installs."""
    rows = runpy.run_path(str(ROOT / ".ci/matrix"))["ROWS"]
    packages = [package for name, (packages, _) in rows.items() if "oldest" in name for package in packages]
    return dict(re.split("={2,3}", package, maxsplit=1) for package in packages)


def test_the_oldest_supported_versions_are_run() -> None:
    """Every lower bound has a row that installs that version; the six main libraries are among them."""
    oldest = run()
    assert set(TESTED) <= oldest.keys()
    for name, bound in declared().items():
        parts = bound.split(".")
        assert oldest.get(name, "").split(".")[: len(parts)] == parts, (name, bound, oldest.get(name))
