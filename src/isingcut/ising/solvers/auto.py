"""Choose the solver: enumeration where it is instant, the exact search where it is likely to end
in time, else the heuristic and a bound."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from isingcut.ising.problem import Problem
from isingcut.ising.solvers._reduced import reduce
from isingcut.ising.solvers.base import Solution
from isingcut.ising.solvers.exact import Exact
from isingcut.ising.solvers.exhaustive import Exhaustive
from isingcut.ising.solvers.tabu import Tabu

__all__ = ["Auto"]

INSTANT_STATES = 1_000_000
# Up to here the exact search finished within minutes on the families of benchmarks/solvers.py.
LIKELY_BLOCKS = 130
LIKELY_STATES = 10**17


@dataclass(frozen=True)
class Auto:
    """Enumeration, the exact search within a time limit, or tabu search with a proven bound.

    Args:
        seconds: time allowed; None lets the exact search run to its end whatever the size.
        seed: of the heuristic.
    """

    seconds: float | None = 60.0
    seed: int = 0

    def solve(self, problem: Problem, k: int) -> Solution:
        """Up to ``k`` low-energy states; ``info["chosen"]`` names the solver."""
        reduced = reduce(problem)
        if reduced.count_states() <= INSTANT_STATES:
            return _named(Exhaustive(INSTANT_STATES).solve(problem, k), "exhaustive")
        likely = reduced.n <= LIKELY_BLOCKS or reduced.count_states() <= LIKELY_STATES
        if self.seconds is None or likely:
            found = Exact(seconds=self.seconds, seed=self.seed).solve(problem, k)
            return _named(found, "exact")
        heuristic = Tabu(seed=self.seed, seconds=self.seconds / 4).solve(problem, k)
        relaxed = Exact(seconds=self.seconds / 2, nodes=8, seed=self.seed).solve(problem, k)
        if relaxed.proven:
            return _named(relaxed, "exact")
        states = np.concatenate([heuristic.states, relaxed.states])
        info = {**relaxed.info, **heuristic.info}
        return _named(Solution(states, relaxed.lower_bound, False, info), "tabu")


def _named(solution: Solution, name: str) -> Solution:
    return Solution(
        solution.states,
        solution.lower_bound,
        solution.proven,
        {**solution.info, "chosen": name},
    )
