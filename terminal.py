"""Progress in the terminal: one line for the stage at work, quiet when nobody watches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)


@contextmanager
def progress_display(console: Console, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Yield notify(stage, done, total). Shows nothing when quiet or when output is not a terminal."""
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
        TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(
        *columns, console=console, disable=quiet or not console.is_terminal, transient=True
    ) as shown:
        task = shown.add_task("start", total=None)
        current = "start"

        def notify(stage: str, done: int, total: int) -> None:
            nonlocal current
            if stage != current:
                current = stage
                shown.reset(task, description=stage, total=total or None, completed=done)
            else:
                shown.update(task, completed=done, total=total or None)

        yield notify
