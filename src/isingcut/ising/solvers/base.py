"""What a solver is: a frozen dataclass of options with `solve(problem, k)`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from isingcut.ising.problem import Problem
from isingcut.ising.states import States

NO_CLASS = "the solver 'dimod' needs a class: write dimod:package.Class"


@dataclass(frozen=True, eq=False)
class Solution:
    """What a solver returns; `isingcut.ising.spectrum.Spectrum` checks and ranks it.

    Args:
        states: (S, N) bool, every one feasible; duplicates and order do not matter.
        lower_bound: a proven lower bound on the ground-state energy, or None.
        proven: the states contain the k lowest of all (or all, where there are fewer).
        info: JSON-able facts about the run: nodes, restarts, dropped samples.
    """

    states: States
    lower_bound: float | None = None
    proven: bool = False
    info: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class Solver(Protocol):
    """A solver part."""

    def solve(self, problem: Problem, k: int) -> Solution:
        """Up to ``k`` low-energy feasible states of ``problem``.

        Raises:
            InfeasibleError: the problem has no feasible state.
        """
        ...
