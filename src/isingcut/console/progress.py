"""Progress of long work: a bar with the remaining time on a terminal, lines in a log elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from isingcut.console.printing import printable, say
from isingcut.errors import InputError


class Bar(Protocol):
    """One task in progress."""

    def advance(self, steps: float = 1, note: str = "") -> None:
        """Count ``steps`` more. ``note`` is a short text shown next to the bar, for example the
        best result so far; it stays until the next one."""


Progress = Callable[[str, float], contextlib.AbstractContextManager[Bar]]
"""``with progress("measuring pairs", total) as bar: bar.advance(1)``; 0 is an unknown total."""


@contextlib.contextmanager
def silent(description: str, total: float) -> Iterator[Bar]:
    """Show no progress."""
    # Without a total, it prints nothing.
    yield PlainBar(description, 0)


def as_progress(given: Progress | bool | None) -> Progress:
    """Return the progress function for an argument: True is `terminal`, False `silent`.

    None is `terminal` if standard error is a terminal, else `slow_work`.

    Raises:
        InputError: neither a bool nor a function.
    """
    if given is None:
        return terminal if sys.stderr.isatty() else slow_work
    if isinstance(given, bool):
        return terminal if given else silent
    if not callable(given):
        raise InputError(
            "progress must be True, False or a function like isingcut.console.progress.terminal, "
            f"got {given!r:.60}"
        )
    return given


@dataclass
class Part:
    """A part of a bar, passed as `Progress` to work that would otherwise show its own bar.

    Args:
        bar: the whole bar.
        left: the number of steps of ``bar`` for the remaining work.
    """

    bar: Bar
    left: float
    _scale: float = 0.0
    _words: str = ""

    @contextlib.contextmanager
    def __call__(self, description: str, total: float) -> Iterator[Bar]:
        """Divide the remaining part among ``total`` steps."""
        self._scale = self.left / max(total, 1e-9)
        self._words = description
        yield self

    def advance(self, steps: float = 1, note: str = "") -> None:
        """Count a share of the remaining part."""
        step = min(self.left, steps * self._scale)
        self.left -= step
        self.bar.advance(step, note or self._words)

    def finish(self, note: str) -> None:
        """Count the whole remaining part."""
        self.bar.advance(self.left, note)
        self.left = 0.0


QUIET_SECONDS = 5.0
"""Minimum time between two log lines about a task."""


@dataclass
class PlainBar:
    """Progress for logs: a line at each tenth and at the end, with the remaining time and the note.

    The first call of `advance` is not used to estimate the remaining time, because resumed work
    reports its earlier steps in it.

    Args:
        description: the name of the task.
        total: its number of steps.
        clock: returns the time in seconds.
    """

    description: str
    total: float
    clock: Callable[[], float] = time.monotonic
    done: float = 0.0
    printed: int = 0
    note: str = ""
    first: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        self.began = self.last = self.clock()

    def advance(self, steps: float = 1, note: str = "") -> None:
        """Count ``steps`` more; print a line at each tenth, but not too often."""
        self.done += steps
        self.note = note or self.note
        if not self.total:
            return
        tenth = min(9, int(10 * self.done / self.total + 1e-9))
        now = self.clock()
        since, before = self.first or (self.began, 0.0)
        self.first = self.first or (now, self.done)
        if tenth > self.printed and now - self.last >= QUIET_SECONDS:
            self.printed = tenth
            self.last = now
            # What is written for a text may exceed what was expected.
            steps_left = max(0.0, self.total - self.done)
            left = (now - since) * steps_left / max(self.done - before, 1e-9)
            self._say(f"{10 * tenth}%", f"{duration(left)} left")

    def finish(self) -> None:
        """Print how long the task took, with the last note."""
        if self.total:
            self._say("done", f"took {duration(self.clock() - self.began)}")

    def _say(self, how_far: str, when: str) -> None:
        parts = [f"{self.description}: {how_far}", when, self.note]
        say(", ".join(p for p in parts if p))


def duration(seconds: float) -> str:
    """Format seconds as a rounded time.

    >>> duration(8.4), duration(260), duration(9000)
    ('8 s', '4 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


@contextlib.contextmanager
def slow_work(description: str, total: float) -> Iterator[Bar]:
    """Print lines about a task that takes seconds: the default in Python without a terminal."""
    bar = PlainBar(description, total)
    yield bar
    if bar.clock() - bar.began >= QUIET_SECONDS:
        bar.finish()


@contextlib.contextmanager
def terminal(description: str, total: float) -> Iterator[Bar]:
    """Show a rich bar with the remaining time if stderr is a terminal, plain lines otherwise."""
    from isingcut.console.rich_console import console

    screen = console(stderr=True)
    if not screen.is_terminal:
        plain = PlainBar(description, total)
        yield plain
        plain.finish()
        return
    from rich.progress import Progress as RichProgress
    from rich.progress import TextColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        *RichProgress.get_default_columns()[1:],
        TextColumn("{task.fields[note]}", markup=False),
    )
    with RichProgress(*columns, console=screen, transient=True) as bars:
        task = bars.add_task(printable(description), total=total or None, note="")

        class _RichBar:
            def advance(self, steps: float = 1, note: str = "") -> None:
                bars.update(
                    task, advance=steps, note=note or bars.tasks[task].fields["note"]
                )

        yield _RichBar()
