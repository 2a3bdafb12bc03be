"""Enumerate every feasible state: the oracle the other solvers are tested against."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit

from isingcut.errors import InputError
from isingcut.ising.problem import Problem
from isingcut.ising.solvers._reduced import reduce
from isingcut.ising.solvers.base import Solution
from isingcut.ising.solvers.branching.dfs import reach, sift_down

__all__ = ["Exhaustive"]


@dataclass(frozen=True)
class Exhaustive:
    """All feasible states by depth-first enumeration with incremental energies.

    Memory O(k N); time O(states), about 3 ns each.

    Args:
        limit: most states it will enumerate.

    Raises:
        InputError: the problem has more states than ``limit``.
    """

    limit: int = 20_000_000

    def solve(self, problem: Problem, k: int) -> Solution:
        """The k lowest states, proven."""
        reduced = reduce(problem)
        states = reduced.count_states()
        if states > self.limit:
            raise InputError(
                f"exhaustive search would visit {states:,} states, more than its limit of "
                f"{self.limit:,}; use the solver 'exact' or raise the limit"
            )
        energies = np.full(k, np.inf)
        best = np.zeros((k, reduced.n), dtype=np.uint8)
        visited = 0
        J = np.where(reduced.exclusive, np.inf, reduced.J)
        for m in range(reduced.m_low, reduced.m_high + 1):
            visited += _enumerate(
                reduced.h, J, reduced.A, reduced.low, reduced.high, m, energies, best
            )
        found = np.isfinite(energies)
        ground = float(energies.min()) + reduced.c
        return Solution(reduced.expand(best[found]), ground, True, {"states_visited": visited})


@njit(cache=True)
def _enumerate(h, J, A, low, high, m, energies, best):  # type: ignore[no-untyped-def]
    """Visit all states of m ones; (energies, best) is a max-heap of the k lowest so far.

    J is infinite between variables of which only one may be 1.
    """
    n = h.shape[0]
    rows = A.shape[0]
    least, most = reach(A)
    if m == 0:
        for r in range(rows):
            if not low[r] <= 0.0 <= high[r]:
                return 0
        if energies[0] > 0.0:
            energies[0] = 0.0
            best[0, :] = 0
            sift_down(energies, best)
        return 1
    visited = 0
    chosen = np.zeros(m, dtype=np.int64)
    partial = np.zeros(m + 1)
    marginal = np.zeros((m + 1, n))
    marginal[0] = h
    sums = np.zeros((m + 1, rows))
    depth = 0
    chosen[0] = -1
    while depth >= 0:
        chosen[depth] += 1
        i = chosen[depth]
        if i > n - m + depth:
            depth -= 1
            continue
        energy = partial[depth] + marginal[depth, i]
        if energy == np.inf:
            continue
        fits = True
        for r in range(rows):
            value = sums[depth, r] + A[r, i]
            sums[depth + 1, r] = value
            if depth == m - 1:
                fits &= low[r] <= value <= high[r]
            else:
                fits &= value + most[r, i + 1] >= low[r] and value + least[r, i + 1] <= high[r]
        if not fits:
            continue
        if depth == m - 1:
            visited += 1
            if energy < energies[0]:
                energies[0] = energy
                best[0, :] = 0
                for d in range(m):
                    best[0, chosen[d]] = 1
                sift_down(energies, best)
            continue
        partial[depth + 1] = energy
        for j in range(i + 1, n):
            marginal[depth + 1, j] = marginal[depth, j] + J[i, j]
        depth += 1
        chosen[depth] = i
    return visited
