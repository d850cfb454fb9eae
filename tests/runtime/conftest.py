"""What the runtime's tests share: the tiny model, exported once."""

from __future__ import annotations

import pytest

from contracts.tiny import Tiny, export_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The tiny model's files for every runtime."""
    return export_tiny(tmp_path_factory.mktemp("tiny"))
