"""What a run costs its user: seconds and peak memory of each stage, in the words that progress uses.

    with Costs(notify) as costs:
        pipeline(..., costs.notify)       # every new stage closes the one before it
        report = replace(report, costs=costs.so_far())

Memory is the resident set of this process and its children together, looked at twenty times a second and
(for this process) from the kernel's own high-water mark, which each stage resets. Linux only.
Between stages garbage is collected and free memory is given back, so that a stage's peak is its own.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from vit_export.runtime.protocol import ProgressCallback
from vit_export.runtime.report_schema import StageCost
from vit_export.runtime.worker import peak_rss_bytes

if TYPE_CHECKING:
    from typing_extensions import Self

_PROC = Path("/proc")
_PERIOD = 0.05  # seconds; a look takes a tenth of a millisecond


class Costs:
    """Times stages by their names. A stage that comes back (another image size) is one row."""

    def __init__(self, notify: ProgressCallback) -> None:
        self._notify = notify
        self._found: dict[str, StageCost] = {}
        self._stage, self._since, self._peak = "", time.perf_counter(), 0
        self._changing = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Self:
        gc.collect()
        gc.freeze()  # what imports made is never garbage: collections between stages need not walk it
        if _watched():
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        gc.unfreeze()

    def notify(self, stage: str, done: int, total: int) -> None:
        """The stage at work, as ProgressCallback."""
        self._notify(stage, done, total)
        if stage != self._stage:
            self._close()
            give_back()
            with self._changing:
                self._stage, self._since, self._peak = stage, time.perf_counter(), _resident(os.getpid())
            _reset_peak()

    def so_far(self) -> tuple[StageCost, ...]:
        """All stages until now, in order."""
        self._close()
        self._since = time.perf_counter()
        return tuple(self._found.values())

    def _close(self) -> None:
        if not self._stage:
            return
        peak = max(self._peak, peak_rss_bytes() or 0) if _watched() else None
        seconds = time.perf_counter() - self._since
        before = self._found.get(self._stage)
        if before is not None:
            seconds += before.seconds
            peak = None if peak is None else max(peak, before.peak_rss_bytes or 0)
        self._found[self._stage] = StageCost(stage=self._stage, seconds=seconds, peak_rss_bytes=peak)

    def _look(self) -> None:
        while not self._ended.wait(_PERIOD):
            stage, found = self._stage, sum(map(_resident, _family(os.getpid())))
            with self._changing:
                if stage == self._stage:  # else it was looked at in the one before
                    self._peak = max(self._peak, found)


def give_back() -> None:
    """Collect garbage (traced graphs are full of cycles) and return free memory to the system."""
    gc.collect()
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):  # musl has no malloc_trim
            ctypes.CDLL(None).malloc_trim(0)


def _watched() -> bool:
    return (_PROC / "self" / "statm").exists()


def _reset_peak() -> None:
    with suppress(OSError):  # older kernels, or a /proc that is read-only
        (_PROC / "self" / "clear_refs").write_text("5")


def _family(pid: int) -> Iterator[int]:
    """A process and what it started; a child that has not become its own program yet shares our memory."""
    yield pid
    mine = _read(pid, "cmdline")
    for task in _tasks(pid):
        for child in map(int, task.split()):
            if _read(child, "cmdline") not in ("", mine):
                yield from _family(child)


def _tasks(pid: int) -> Iterator[str]:
    with suppress(OSError):
        for task in (_PROC / str(pid) / "task").iterdir():
            yield _read(pid, f"task/{task.name}/children")


def _resident(pid: int) -> int:
    pages = _read(pid, "statm").split()
    return int(pages[1]) * os.sysconf("SC_PAGE_SIZE") if pages else 0


def _read(pid: int, name: str) -> str:
    try:
        return (_PROC / str(pid) / name).read_text()
    except OSError:  # it ended meanwhile
        return ""
