"""Python 3.10, as on JetPack 6: what a device runs needs nothing newer.

mypy checks the whole package as 3.10 (pyproject.toml). Here an interpreter is started from which everything
that 3.11 brought and we once used is taken away before our modules are imported.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

TAKE_AWAY = """
import datetime, enum, hashlib, importlib, pkgutil, sys, tomllib, typing
import msgspec, numpy, PIL.Image, rich.console, rich.progress, typer  # what they use of 3.11 is theirs
sys.modules["tomli"], sys.modules["tomllib"] = tomllib, None
del enum.StrEnum, hashlib.file_digest, datetime.UTC  # typing.Self cannot go: typing itself reads it
sys.version_info = (3, 10, 12, "final", 0)
"""


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", TAKE_AWAY + code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_of_the_base_install_imports() -> None:
    """The command line and all of runtime and calibration, but what needs torch or a vendor's SDK."""
    run(
        "import vit_export.runtime, vit_export.calibration, vit_export.cli\n"
        "for package in (vit_export.runtime, vit_export.calibration):\n"
        "    for module in pkgutil.iter_modules(package.__path__):\n"
        "        if module.name not in ('torch_runner', 'collect'):\n"
        "            importlib.import_module(f'{package.__name__}.{module.name}')\n"
        "import vit_export.export.trt_build  # engines are built on the device\n"
        "assert 'torch' not in sys.modules\n"
    )


def test_names_are_their_values() -> None:
    """Members of our enums print, format, compare and travel through JSON as on 3.11."""
    said = run(
        "from vit_export.artifacts import Precision\n"
        "from vit_export.runtime.gate_rules import tomllib as toml\n"
        "found = msgspec.json.decode(msgspec.json.encode(Precision.INT8), type=Precision)\n"
        "print(found, f'{found:>6}', found == 'int8', str(found), toml.loads('a = 1'), repr(found))\n"
    )
    assert said.startswith("int8   int8 True int8 {'a': 1} <Precision.INT8")


@pytest.mark.parametrize("command", ["code", "module"])
def test_the_working_directory_shadows_nothing(command: str, tmp_path) -> None:
    """What 3.11's -P does: a file of the user's named like a module is not imported by a worker."""
    from vit_export.python310 import code_command, module_command

    (tmp_path / "json.py").write_text("raise SystemExit('shadowed')")
    line = code_command("import json") if command == "code" else module_command("json.tool", "--help")
    subprocess.run(line, cwd=tmp_path, check=True, capture_output=True, timeout=60)
