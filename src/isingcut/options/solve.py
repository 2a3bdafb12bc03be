"""Options of the solver."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Interval as Bounds

from isingcut.options.declaration import option
from isingcut.options.search import SearchOptions


@dataclass(frozen=True, init=False)
class SolveOptions(SearchOptions):
    """How the low-energy states are found, and how many."""

    solver: str = option(
        "auto",
        "Solver of low-energy states.",
        stages="solve",
    )
    states: Annotated[int, Bounds(ge=1, le=100_000)] = option(
        20,
        "States kept in the spectrum.",
        stages="solve",
    )
