"""Choose the solver: the exact search if it is likely to finish in time, else tabu search and a
bound."""

from dataclasses import dataclass, replace

import numpy as np

from isingcut.ising.problem import Problem
from isingcut.ising.solvers.base import Solution, reduce
from isingcut.ising.solvers.exact import Exact, compile_search
from isingcut.ising.solvers.tabu import Tabu

__all__ = ["Auto"]

# Up to these sizes the exact search took minutes on the families of benchmarks/solvers.py.
LIKELY_BLOCKS = 130
LIKELY_STATES = 10**17


@dataclass(frozen=True)
class Auto:
    """The exact search within a time limit, or tabu search with a proven bound.

    Args:
        seconds: time limit; None always runs the exact search to its end.
        seed: random seed of the tabu search.
    """

    seconds: float | None = 60.0
    seed: int = 0

    def solve(self, problem: Problem, k: int) -> Solution:
        """Find up to ``k`` low-energy states; ``info["chosen"]`` names the solver."""
        reduced = reduce(problem)
        likely = reduced.n <= LIKELY_BLOCKS or reduced.count_states() <= LIKELY_STATES
        chosen = "exact"
        if self.seconds is None or likely:
            solution = Exact(seconds=self.seconds, seed=self.seed).solve(problem, k)
        else:
            compile_search()
            heuristic = Tabu(seed=self.seed, seconds=self.seconds / 4).solve(problem, k)
            few = Exact(seconds=self.seconds / 2, nodes=8, seed=self.seed)
            solution = few.solve(problem, k)
            if not solution.proven:
                chosen = "tabu"
                states = np.concatenate([heuristic.states, solution.states])
                info = {**solution.info, **heuristic.info}
                solution = replace(solution, states=states, info=info)
        return replace(solution, info={**solution.info, "chosen": chosen})
