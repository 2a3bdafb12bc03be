"""The semidefinite bound of one subproblem of the exact search."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from isingcut.ising.solvers._reduced import Reduced
from isingcut.ising.solvers.branching.sdp import sdp_bound, split_bounds
from isingcut.ising.states import Bools, Floats


@dataclass(eq=False)
class Dual:
    """Multipliers of a relaxation over the variables ``free`` (index 0 is the constant spin).

    The first ``equal`` of the ``cuts`` hold with equality: their multipliers have any sign.
    """

    free: NDArray[np.int64]
    equal: int
    y: Floats
    mu: Floats
    z: Floats
    cuts: NDArray[np.int16]
    kinds: NDArray[np.int8]
    centre: NDArray[np.float32]

    def restrict(self, fixed: NDArray[np.int8]) -> Dual:
        """The same multipliers where more variables are fixed (0 or 1 in ``fixed``).

        A fixed spin equals plus or minus the constant spin, so its row merges into row 0 and a
        triangle through it becomes one through 0; triangles that lose two spins say nothing.
        """
        values = fixed[self.free]
        stays = values < 0
        size = self.free.size + 1
        place = np.zeros(size, dtype=np.int64)
        place[1:][stays] = np.arange(1, int(stays.sum()) + 1)
        sign = np.ones(size, dtype=np.int64)
        sign[1:][~stays] = 2 * values[~stays].astype(np.int64) - 1
        width = int(stays.sum()) + 1
        y: Floats = np.bincount(place, weights=self.y, minlength=width).astype(np.float64)

        cuts = self.cuts.astype(np.int64)
        new = place[cuts]
        alive = (new[:, 0] != new[:, 1]) & (new[:, 0] != new[:, 2]) & (new[:, 1] != new[:, 2])
        equal = np.arange(self.z.size) < self.equal
        alive &= equal | (self.z > 0)
        cuts, new, weights = cuts[alive], new[alive], self.z[alive]
        s = sign[cuts]
        table = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
        # A spin's own signature: flipping spin i flips the signs of its two pairs.
        pair = table[self.kinds[alive]] * np.stack(
            [s[:, 0] * s[:, 1], s[:, 0] * s[:, 2], s[:, 1] * s[:, 2]], axis=1
        )
        order = np.argsort(new, axis=1)
        new = np.take_along_axis(new, order, axis=1)
        # Pairs are named by the spin they leave out: (ij, ik, jk) leave out (k, j, i).
        left_out = np.take_along_axis(pair[:, ::-1], order, axis=1)[:, ::-1]
        kinds = np.where(
            left_out[:, 0] > 0,
            np.where(left_out[:, 1] > 0, 0, 1),
            np.where(left_out[:, 1] > 0, 2, 3),
        )
        key = ((new[:, 0] * width + new[:, 1]) * width + new[:, 2]) * 4 + kinds
        key, first, inverse = np.unique(key, return_index=True, return_inverse=True)
        z: Floats = np.bincount(inverse, weights=weights, minlength=key.size).astype(np.float64)
        equal = np.bincount(inverse, weights=equal[alive], minlength=key.size) > 0
        order = np.argsort(~equal, kind="stable")
        first, z = first[order], z[order]

        kept = np.flatnonzero(np.concatenate([[True], stays]))
        centre = self.centre[np.ix_(kept, kept)].copy()
        gone = np.flatnonzero(~stays) + 1
        if gone.size == 1 and centre.any():
            # The conditional mean of the others given the fixed spin.
            i, sigma = int(gone[0]), float(sign[gone[0]])
            weight = 1.0 + sigma * float(self.centre[0, i])
            if weight > 0.05:
                row = (self.centre[0] + sigma * self.centre[i]) / weight
                row = np.clip(row[kept], -1.0, 1.0)
                row[0] = 1.0
                centre[0, :] = row
                centre[:, 0] = row
        return Dual(
            self.free[stays],
            int(equal.sum()),
            y,
            self.mu.copy(),
            z,
            new[first].astype(np.int16),
            kinds[first].astype(np.int8),
            centre,
        )


@dataclass(order=True)
class Node:
    """A subproblem: ``fixed`` (V,) is 0, 1 or -1 (free), and ``m`` ones in all."""

    bound: float
    serial: int
    fixed: NDArray[np.int8] = field(compare=False)
    m: int = field(compare=False)
    dual: Dual | None = field(compare=False, default=None)


@dataclass(eq=False)
class Subproblem:
    """What is left of a node: base + h.x + sum J x x over the ``free`` variables, ``left`` ones,
    of which no two are ``exclusive``.
    """

    fixed: NDArray[np.int8]
    free: NDArray[np.int64]
    h: Floats
    J: Floats
    exclusive: Bools
    base: float
    left: int

    @classmethod
    def of(
        cls, h: Floats, J: Floats, exclusive: Bools, fixed: NDArray[np.int8], m: int
    ) -> Subproblem:
        """The subproblem where the variables with 0 or 1 in ``fixed`` are fixed."""
        free, ones = np.flatnonzero(fixed < 0), fixed == 1
        return cls(
            fixed,
            free,
            h[free] + J[np.ix_(free, ones)].sum(axis=1),
            J[np.ix_(free, free)],
            exclusive[np.ix_(free, free)],
            float(h[ones].sum() + J[np.ix_(ones, ones)].sum() / 2),
            m - int(ones.sum()),
        )


def spin_matrix(h: Floats, J: Floats, constant: float) -> Floats:
    """C (N, N) with <C, s s^T> = constant + h.x + sum_{i<j} J_ij x_i x_j for s = (1, 2 x - 1)."""
    n = h.shape[0]
    C = np.zeros((n + 1, n + 1))
    rows = J.sum(axis=1)
    C[1:, 1:] = J / 8
    C[0, 1:] = C[1:, 0] = h / 4 + rows / 8
    C[0, 0] = constant + h.sum() / 2 + rows.sum() / 8
    return C


def independent(rows: Floats) -> Floats:
    """The rows without those that depend on the others, so that reflections exist."""
    kept: list[Floats] = []
    basis: list[Floats] = []
    for row in rows:
        rest = row / (np.linalg.norm(row) or 1.0)
        for b in basis:
            rest = rest - (rest @ b) * b
        norm = float(np.linalg.norm(rest))
        if norm > 1e-6:
            basis.append(rest / norm)
            kept.append(row / np.linalg.norm(row))
    return np.array(kept).reshape(len(kept), rows.shape[1])


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
