"""Choose the solver by the size of the problem."""

from __future__ import annotations

from dataclasses import dataclass

from isingcut.problem import Problem
from isingcut.solvers._reduced import reduce
from isingcut.solvers.base import Solution

__all__ = ["Auto"]


@dataclass(frozen=True)
class Auto:
    """Exhaustive search where it is quick, else tabu search.

    Args:
        exhaustive_limit: most states to enumerate.
        seed: of the heuristic.
    """

    exhaustive_limit: int = 20_000_000
    seed: int = 0

    def solve(self, problem: Problem, k: int) -> Solution:
        """Up to ``k`` low-energy states; ``info["chosen"]`` names the solver."""
        if reduce(problem).count_states() <= self.exhaustive_limit:
            from isingcut.solvers.exhaustive import Exhaustive

            chosen, solution = "exhaustive", Exhaustive(self.exhaustive_limit).solve(problem, k)
        else:
            from isingcut.solvers.tabu import Tabu

            chosen, solution = "tabu", Tabu(seed=self.seed).solve(problem, k)
        info = {**solution.info, "chosen": chosen}
        return Solution(solution.states, solution.lower_bound, solution.proven, info)
