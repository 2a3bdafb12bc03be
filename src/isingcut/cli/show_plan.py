"""How `isingcut plan` prints its estimates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from isingcut.console.progress import duration
from isingcut.console.rich_console import console

if TYPE_CHECKING:
    from isingcut.runs.plan import Plan
    from isingcut.runs.prices import Estimate


def size(value: float) -> str:
    """Bytes in words.

    >>> size(950), size(2.5e6), size(7.2e10)
    ('950 B', '2.5 MB', '72 GB')
    """
    for unit, one in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= one:
            return f"{value / one:.{1 if value < 10 * one else 0}f} {unit}"
    return f"{value:.0f} B"


def show_plan(plan: Plan) -> None:
    """The table of energies, the stages after them, and what to type."""
    screen = console()
    where = "read from disk block by block" if plan.streamed else "in memory"
    screen.print(
        f"{plan.model}: {plan.blocks} blocks, {size(plan.weights)} as {plan.dtype}, {where} "
        f"(allowed: {size(plan.allowed)}) on {plan.device}\n"
        f"forward {plan.forward:.0f} tokens/s, weights from disk {size(plan.reading)}/s; "
        f"probed in {duration(plan.probe_seconds)}, one process",
        soft_wrap=True,
    )
    screen.print(_table("energy", "energies, each at its number of samples", plan.energies))
    rest = f"the other stages, {plan.remove} blocks removed"
    screen.print(_table("stage", rest, plan.stages))
    screen.print(
        f"recommended: {plan.recommended}, {duration(plan.total(plan.recommended))} in all: "
        f"{plan.why}\n{plan.command}",
        soft_wrap=True,
    )


def _table(first: str, title: str, estimates: Sequence[Estimate]) -> Table:
    table = Table(first, title=title, title_justify="left")
    for name in ("samples", "time", "between", "memory", "disk"):
        table.add_column(name, justify="right")
    for e in estimates:
        between = f"{duration(e.low)} and {duration(e.high)}"
        figures = (duration(e.seconds), between, size(e.memory), size(e.disk))
        samples = str(e.samples) if e.samples else ""
        table.add_row(e.name, samples, *([e.impossible] if e.impossible else figures))
    return table
