"""A progress bar on a terminal, and a line now and then in a file; needs rich alone."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

_PLAIN_LINES = 10


class Bar:
    """One bar; where the output is no terminal, a plain line every tenth of the way, so that logs stay readable."""

    def __init__(self, console: Console, name: str, total: int, done: int = 0) -> None:
        self.console, self.name, self.total = console, name, total
        self.printed = done * _PLAIN_LINES // max(1, total)
        self.progress: Progress | None = None
        self.task = TaskID(0)
        if console.is_terminal:
            self.progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                console=console,
            )
            self.task = self.progress.add_task(name, total=total, completed=done, note="")
            self.progress.start()

    def update(self, done: int, note: str = "") -> None:
        if self.progress is not None:
            self.progress.update(self.task, completed=done, note=note)
        elif done * _PLAIN_LINES // max(1, self.total) > self.printed:
            self.printed = done * _PLAIN_LINES // max(1, self.total)
            self.console.print(Text(f"{self.name} {done}/{self.total}  {note}".rstrip()))

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()


@contextmanager
def bar(console: Console, name: str, total: int, done: int = 0) -> Iterator[Bar]:
    """A :class:`Bar` that is closed whatever happens."""
    shown = Bar(console, name, total, done)
    try:
        yield shown
    finally:
        shown.close()
