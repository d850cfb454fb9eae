"""`python export_once.py MOMENT ACTION ARGUMENTS...`: vit-export that dies at a chosen file system event.

An event is anything that creates, renames, links or removes a file, or starts a process, as Python's audit
hooks report it. MOMENT is the number of an event, or part of the name of a file that is written; with 0 the
export lives, and how many events it had is written to the file that EVENTS names. ACTION is `kill` (SIGKILL
to itself) or `interrupt` (what Ctrl-C sends). Latency is not measured: nothing here looks at it.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np

from vit_export import cli, one_size
from vit_export.runtime.latency import Timings

SIGNALS = {"kill": signal.SIGKILL, "interrupt": signal.SIGINT}
EVENTS = ("os.rename", "os.link", "os.remove", "os.mkdir", "os.truncate", "subprocess.Popen")


def instead(runnables: Any, **settings: Any) -> Timings:
    """A millisecond for everything."""
    return Timings({name: (np.full(50, 1_000_000),) for name in runnables})


class Hook:
    """Counts events and dies at the one that was asked for."""

    def __init__(self, moment: str, action: str) -> None:
        self.count, self._moment, self._signal = 0, moment, SIGNALS[action]

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        opened = event == "open" and isinstance(arguments[1], str) and arguments[1][0] in "wxa"
        if opened or event in EVENTS:
            self.count += 1
            if str(self.count) == self._moment:
                os.kill(os.getpid(), self._signal)
        elif event == "tempfile.mkstemp" and not self._moment.isdigit() and self._moment in arguments[0]:
            os.kill(os.getpid(), self._signal)


def main() -> None:
    moment, action, *arguments = sys.argv[1:]
    one_size.alternate = instead
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    import vit_export.pipeline  # noqa: F401  (what importing torch writes is no event of ours)

    hook = Hook(moment, action)
    sys.addaudithook(hook)
    sys.argv = ["vit-export", *arguments]
    try:
        cli.main()
    finally:
        if "EVENTS" in os.environ:
            Path(os.environ["EVENTS"]).write_text(str(hook.count))


if __name__ == "__main__":
    main()
