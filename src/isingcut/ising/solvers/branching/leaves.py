"""Small subproblems of the exact search, settled by depth-first enumeration."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from isingcut.ising.solvers._reduced import Reduced
from isingcut.ising.solvers.branching.dfs import enumerate_below
from isingcut.ising.solvers.branching.node import Subproblem
from isingcut.ising.solvers.branching.pool import Pool

# Nodes of one enumeration, tuned on the families of benchmarks/solvers.py.
ROOT_BUDGET = 1_000_000
NODE_BUDGET = 60_000


class Leaves:
    """Tries to enumerate subproblems, and remembers at which size that tends to succeed.

    Args:
        rows: the reduced problem, for its rows.
        k: how many states are wanted.
        pool: takes what is found.
        stop: (1,) shared flag.
    """

    def __init__(self, rows: Reduced, k: int, pool: Pool, stop: NDArray[np.int64]) -> None:
        self.rows = rows
        self.k = k
        self.pool = pool
        self.stop = stop
        self.visited = 0
        # Share of enumerations that finished within their budget, by log2 of the state count.
        self._luck: dict[int, float] = {}

    def settle(self, part: Subproblem, root: bool) -> bool:
        """Enumerate the subproblem; False if its budget ran out first."""
        n, left = part.free.size, part.left
        difficulty = round(4 * math.log2(math.comb(n, left)))
        luck = self._luck.get(difficulty, 1.0)
        if not root and luck < 0.15:
            self._luck[difficulty] = luck + 0.002
            return False
        r, h, J, base = self.rows, part.h, part.J, part.base
        # Costly blocks first: choosing one is soon refuted, and the cheap ones that remain
        # for the end are few.
        order = np.argsort(-(h + J.sum(axis=1) * (left / n) / 2))
        A = r.A[:, part.free[order]]
        shift = r.A @ (part.fixed == 1)
        low, high = r.low - shift, r.high - shift
        h, J = h[order], np.where(part.exclusive, np.inf, J)[np.ix_(order, order)]
        flip = 2 * left > n and not part.exclusive.any()
        if flip:
            # The same problem in x -> 1 - x has fewer ones to place.
            base += float(h.sum() + J.sum() / 2)
            h = -(h + J.sum(axis=1))
            total = A.sum(axis=1)
            A, low, high = -A, low - total, high - total
            order, h, J, A = order[::-1], h[::-1], J[::-1, ::-1], A[:, ::-1]
            left = n - left
        energies = np.full(self.k, np.inf)
        best = np.zeros((self.k, n), dtype=np.uint8)
        complete, visited = enumerate_below(
            np.ascontiguousarray(h),
            np.ascontiguousarray(J),
            np.ascontiguousarray(A),
            low,
            high,
            left,
            base,
            self.pool.threshold,
            self.stop,
            ROOT_BUDGET if root else NODE_BUDGET,
            energies,
            best,
        )
        self.visited += int(visited)
        if not root:
            self._luck[difficulty] = luck + 0.1 * (float(complete) - luck)
        found = np.isfinite(energies)
        if found.any():
            states = np.repeat((part.fixed == 1).astype(np.uint8)[None], int(found.sum()), axis=0)
            states[:, part.free[order]] = 1 - best[found] if flip else best[found]
            self.pool.add(energies[found], states)
        return bool(complete)
