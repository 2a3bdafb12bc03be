"""The semidefinite bound of one subproblem of the exact search."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from isingcut.ising.solvers._reduced import Reduced
from isingcut.ising.solvers.branching.node import Dual, Subproblem, independent, spin_matrix
from isingcut.ising.solvers.branching.sdp import sdp_bound, split_bounds
from isingcut.ising.states import Floats

# Tuned on the families of benchmarks/solvers.py.
SIGMA = 0.01
ROUNDS = 12
ITERATIONS = 20
CUTS_PER_ROUND = 400
CAPACITY = 6000
GIVE_UP = 0.12
# Beyond it the tree seldom ends, and the root's bound is what counts; below, a root that took
# longer cost more nodes than it saved.
LARGE = 130


class Relaxation:
    """Bounds subproblems of one reduced problem; threads share it, each with its own scratch."""

    def __init__(self, rows: Reduced, threshold: Floats, stop: NDArray[np.int64]) -> None:
        self.rows = rows
        self.threshold = threshold
        self.stop = stop
        self.evaluations = 0
        size = np.abs(rows.A).sum(axis=1, initial=0.0)
        self._equal = rows.high - rows.low <= 4e-9 * np.maximum(1.0, size)
        self._roots: dict[int, Dual] = {}

    def start(self, dual: Dual | None, part: Subproblem, m: int) -> Dual:
        """Multipliers to begin with: the parent's, else the root's, else none."""
        dual = dual or self._roots.get(m)
        if dual is None:
            size = part.free.size + 1
            pairs = np.argwhere(np.triu(part.exclusive)) + 1
            return Dual(
                part.free,
                pairs.shape[0],
                np.zeros(size),
                np.zeros(2 * self.rows.A.shape[0]),
                np.zeros(pairs.shape[0]),
                np.insert(pairs, 0, 0, axis=1).astype(np.int16),
                np.zeros(pairs.shape[0], dtype=np.int8),
                np.zeros((size, size), dtype=np.float32),
            )
        return dual if dual.free.size == part.free.size else dual.restrict(part.fixed)

    def spin_rows(self, part: Subproblem) -> tuple[Floats, Floats]:
        """Equality rows a.s = 0 (R, N) and inequality rows g.s >= 0 (2 A, N), s = (1, spins)."""
        r = self.rows
        shift = r.A @ (part.fixed == 1)
        A = r.A[:, part.free]

        def spin(coefficients: Floats, rhs: Floats) -> Floats:
            # a.x = a.(s + 1) / 2, so a.x - rhs is (a.s + sum(a) - 2 rhs) / 2.
            return np.column_stack([coefficients.sum(axis=1) - 2 * rhs, coefficients])

        middle = (r.low + r.high)[self._equal] / 2
        ones = spin(np.ones((1, part.free.size)), np.array([float(part.left)]))
        equal = np.vstack([ones, spin(A[self._equal], middle - shift[self._equal])])
        low = np.where(np.isfinite(r.low), r.low, shift + np.minimum(A, 0).sum(axis=1))
        high = np.where(np.isfinite(r.high), r.high, shift + np.maximum(A, 0).sum(axis=1))
        ineq = np.vstack([spin(A, low - shift), -spin(A, high - shift)])
        ineq /= np.maximum(np.abs(ineq).max(axis=1, initial=0.0), 1e-300)[:, None]
        # In one memory order: each other one is compiled anew, for ten seconds.
        return np.ascontiguousarray(independent(equal)), np.ascontiguousarray(ineq)

    def bound(
        self, part: Subproblem, m: int, dual: Dual, scratch: NDArray[np.uint8]
    ) -> tuple[float, Floats, Dual]:
        """Lower bound, lower bounds (2, V) for each value of each variable, multipliers.

        A large root's takes every round.
        """
        large = part.free.size == self.rows.n > LARGE
        size = part.free.size + 1
        C = spin_matrix(part.h, part.J, part.base)
        rows, ineq = self.spin_rows(part)
        count = dual.z.size
        capacity = max(CAPACITY, count)
        cuts = np.zeros((capacity, 3), dtype=np.int16)
        kinds = np.zeros(capacity, dtype=np.int8)
        z = np.zeros(capacity)
        cuts[:count], kinds[:count], z[:count] = dual.cuts, dual.kinds, dual.z
        y, mu = dual.y.copy(), dual.mu.copy()
        centre = dual.centre.astype(np.float64)
        lower, count, evaluations = sdp_bound(
            C,
            rows,
            ineq,
            y,
            z,
            mu,
            cuts,
            kinds,
            count,
            dual.equal,
            self.threshold,
            self.stop,
            scratch,
            centre,
            ROUNDS,
            ITERATIONS,
            CUTS_PER_ROUND,
            SIGMA / size,
            -np.inf if large else GIVE_UP,
        )
        self.evaluations += int(evaluations)
        splits = np.full((2, size), -np.inf)
        if lower < self.threshold[0] and not self.stop[0]:
            split_bounds(C, rows, ineq, y, z, mu, cuts, kinds, count, splits)
        kept = (z[:count] > 0) | (np.arange(count) < dual.equal)
        new = Dual(
            part.free,
            dual.equal,
            y,
            mu,
            z[:count][kept],
            cuts[:count][kept],
            kinds[:count][kept],
            centre.astype(np.float32),
        )
        if m not in self._roots or large:
            self._roots[m] = new
        return float(lower), splits[:, 1:], new
