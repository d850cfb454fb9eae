"""The command line in this process, and a sweep's file on the embedded data."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from vit_export import cli


@dataclass(frozen=True)
class Run:
    """What a command did."""

    code: int
    out: str
    err: str


@pytest.fixture
def vit_export(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    """`vit-export ARGUMENTS` in this process."""

    def run(*arguments: object) -> Run:
        monkeypatch.setattr(sys, "argv", ["vit-export", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capfd.readouterr()
        return Run(int(stop.value.code or 0), out, err)

    return run


@pytest.fixture
def no_output(tmp_path: Path) -> Path:
    return tmp_path / "out"
