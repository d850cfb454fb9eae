"""Progress in the terminal: one line for the stage at work, quiet when nobody watches."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from vit_export.runtime.protocol import ProgressCallback

DOWNLOAD = "download"  # the hub's client draws its own bars, with bytes and time left: ours makes room


class _Counts(ProgressColumn):
    """`17/128` where a stage has steps."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.completed:.0f}/{task.total:.0f}" if _counted(task) else "")


class _Left(TimeRemainingColumn):
    """Time left where a stage has steps."""

    def render(self, task: Task) -> Text:
        return Text.assemble(super().render(task), " left") if _counted(task) else Text("")


def _counted(task: Task) -> bool:
    return task.total is not None and task.total > 1


@dataclass(slots=True)
class _Display:
    """What is shown and, for --verbose, what each stage took."""

    shown: Progress
    lines: Console | None  # where finished stages are written
    stage: str = "start"
    steps: int = 0
    since: float = field(default_factory=time.monotonic)

    def notify(self, stage: str, done: int, total: int) -> None:
        """The stage at work: a new one, or more steps of it."""
        (task,) = self.shown.task_ids
        if stage != self.stage:
            self.finish()
            self.stage, self.since = stage, time.monotonic()
            self.shown.reset(task, description=stage, total=total or None, completed=done)
            (self.shown.stop if stage.startswith(DOWNLOAD) else self.shown.start)()
        else:
            self.shown.update(task, completed=done, total=total or None)
        self.steps = total

    def finish(self) -> None:
        """Write the line of the stage that ended."""
        if self.lines is not None and self.stage != "start":
            steps = f", {self.steps} steps" if self.steps > 1 else ""
            self.lines.print(f"{self.stage}: {time.monotonic() - self.since:.1f} s{steps}", style="dim")


@contextmanager
def progress_display(console: Console, quiet: bool, verbose: bool = False) -> Iterator[ProgressCallback]:
    """Yield notify(stage, done, total). Shows nothing when quiet or when output is not a terminal.

    verbose: also writes a line to stderr for every stage that ends, terminal or not.
    """
    hidden = quiet or not console.is_terminal
    if hidden:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=16), _Counts(),
        TimeElapsedColumn(), _Left(),
    )  # fmt: skip
    lines = Console(stderr=True, markup=False, emoji=False, highlight=False) if verbose else None
    with Progress(*columns, console=console, disable=hidden, transient=True) as shown:
        shown.add_task("start", total=None)
        display = _Display(shown, lines)
        yield display.notify
        display.finish()
