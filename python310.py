"""What Python 3.10 lacks of what this project uses, in one place.

JetPack 6 brings Python 3.10, and its `tensorrt` for no other; so what runs on a device (the base install)
runs on 3.10, while exporting needs torch's own minimum. `mypy` checks the whole package as 3.10.
"""

from __future__ import annotations

import hashlib
import sys
from enum import Enum
from pathlib import Path

__all__ = ["StrEnum", "code_command", "module_command", "sha256_of", "tomllib"]

_CHUNK = 1 << 20

if sys.version_info >= (3, 11):
    from enum import StrEnum

    import tomllib
else:
    import tomli as tomllib

    class StrEnum(str, Enum):
        """enum.StrEnum: members are, print and format as their values."""

        __str__ = str.__str__

        def __format__(self, spec: str) -> str:
            return format(self.value, spec)


def module_command(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of ours without the working directory on the path, where a file of the
    user's could shadow a module (3.11's `-P`)."""
    run = f"import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    return code_command(run, *arguments)


def code_command(code: str, *arguments: str) -> list[str]:
    """`python -P -c code`."""
    return [sys.executable, "-c", f"import sys; sys.path.pop(0); {code}", *arguments]


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces (3.11's hashlib.file_digest)."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
