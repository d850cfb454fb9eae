"""How long a user waits for the command to say anything."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

HELP_SECONDS = 0.3
_TRIES = 5  # of which the fastest counts: others were cold or disturbed


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="processor time of one child")
def test_help_is_there_at_once() -> None:
    """`vit-export --help` costs less than 0.3 s of the processor, the interpreter's own start included:
    what a user waits for on a machine that does nothing else."""
    code = "from vit_export.cli import main; main()"
    spent = []
    for _ in range(_TRIES):
        child = subprocess.Popen([sys.executable, "-c", code, "--help"], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        assert child.returncode == 0
        spent.append(usage.ru_utime + usage.ru_stime)
    assert min(spent) < HELP_SECONDS, f"{min(spent):.2f} s"


def test_help_imports_no_numbers() -> None:
    """Help needs neither numpy nor an SDK: that is why it is quick."""
    code = (
        "import sys; sys.argv = ['vit-export', '--help']\n"
        "from vit_export.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'msgspec', 'torch', 'PIL'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, timeout=60)
