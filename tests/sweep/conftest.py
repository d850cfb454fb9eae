"""Where a sweep would write."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def no_output(tmp_path: Path) -> Path:
    return tmp_path / "out"
