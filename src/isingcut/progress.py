"""Progress of long work: a bar with an estimate on a terminal, one line per task elsewhere."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Protocol


class Bar(Protocol):
    """One task in progress."""

    def advance(self, steps: float = 1, note: str = "") -> None:
        """Count ``steps`` more; ``note`` is a few words shown beside the bar."""


class _SilentBar:
    def advance(self, steps: float = 1, note: str = "") -> None:
        pass


Progress = Callable[[str, float], contextlib.AbstractContextManager[Bar]]
"""``with progress("measuring pairs", total) as bar: bar.advance(1)``."""


@contextlib.contextmanager
def silent(description: str, total: float) -> Iterator[Bar]:
    """Shows nothing: the default in Python."""
    yield _SilentBar()


class _PlainBar:
    """For logs: says when a task starts, passes each tenth, and ends."""

    def __init__(self, description: str, total: float) -> None:
        self.description, self.total, self.done, self.said = description, total, 0.0, 0

    def advance(self, steps: float = 1, note: str = "") -> None:
        self.done += steps
        tenth = int(10 * self.done / self.total) if self.total else 10
        if tenth > self.said:
            self.said = tenth
            tail = f"  {note}" if note else ""
            print(f"{self.description}: {min(100, 10 * tenth)}%{tail}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def terminal(description: str, total: float) -> Iterator[Bar]:
    """A rich bar with the time left when stderr is a terminal, plain lines otherwise."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _PlainBar(description, total)
        return
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with RichProgress(*columns, console=console, transient=True) as bars:
        task = bars.add_task(description, total=total, note="")

        class _RichBar:
            def advance(self, steps: float = 1, note: str = "") -> None:
                bars.update(task, advance=steps, note=note)

        yield _RichBar()
