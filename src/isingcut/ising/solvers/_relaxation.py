"""Lower bounds by semidefinite relaxation, valid at every step of their computation.

In spins, with s_0 = 1, the energy of a subproblem is <C, Y> for Y = s s^T. The relaxation requires
diag(Y) = 1, Y positive semidefinite, Y a = 0 for each equality row a.s = 0 (all products of the
row with a variable), g.Y_0 >= 0 for inequality rows, and triangle inequalities. The rows Y a = 0
are eliminated: Y = P Y P with P the projection on the rows' complement. The Lagrangian dual in y
(diagonal), z >= 0 (triangles) and mu >= 0 (inequality rows) is

    sum(y) - sum(z) + min { <Z, Y> : Y psd, trace Y = N },   Z = C - Diag(y) - B*(z) - G*(mu)

whose last term is N min(0, smallest eigenvalue of P Z P): a valid bound for any y and z, mu >= 0.
It is maximised by the proximal method (J. Malick, J. Povh, F. Rendl, A. Wiegele, "Regularization
methods for semidefinite programming", SIAM J. Optim. 20, 2009): the term sigma / 2 ||Y - centre||^2
replaces the trace constraint and makes the dual smooth; L-BFGS-B maximises it for a few steps; Y
becomes the next centre, and violated triangles are added. Bounds from such a relaxation inside
branch and bound for this kind of problem: J. Malick, F. Roupin, "Solving k-cluster problems to
optimality with semidefinite programming", Math. Programming B 136, 2012.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import orth
from scipy.optimize import Bounds, minimize

from isingcut.ising.solvers._enumeration import compiled
from isingcut.ising.solvers.base import Reduced
from isingcut.ising.states import Floats

SIGNS = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
"""Signs of Y_ij, Y_ik and Y_jk for each kind of triangle; the signed sum must be at least -1."""

# Tuned on the families of benchmarks/solvers.py.
SIGMA = 0.005
ROUNDS = 12
ITERATIONS = 20
CUTS_PER_ROUND = 400
GIVE_UP = 0.12
LEAST_VIOLATION = 0.01


@compiled
def _triangle(X, triangle):  # type: ignore[no-untyped-def]
    i, j, k, kind = triangle
    signs = SIGNS[kind]
    return signs[0] * X[i, j] + signs[1] * X[i, k] + signs[2] * X[j, k]


@compiled
def _slack_matrix(C, ineq, x, cuts):  # type: ignore[no-untyped-def]
    """Return Z = C - Diag(y) - B*(z) - G*(mu) for x = (y, z, mu)."""
    size = C.shape[0]
    count = cuts.shape[0]
    Z = C - np.diag(x[:size])
    for t in range(count):
        i, j, k, kind = cuts[t]
        signs = 0.5 * x[size + t] * SIGNS[kind]
        Z[i, j] -= signs[0]
        Z[j, i] -= signs[0]
        Z[i, k] -= signs[1]
        Z[k, i] -= signs[1]
        Z[j, k] -= signs[2]
        Z[k, j] -= signs[2]
    for q in range(ineq.shape[0]):
        row = 0.5 * x[size + count + q] * ineq[q]
        Z[0] -= row
        Z[:, 0] -= row
    return Z


@compiled
def _project(Z, Q):  # type: ignore[no-untyped-def]
    """Return P Z P for P = I - Q Q^T."""
    M = Z @ Q
    M -= 0.5 * Q @ (Q.T @ M)
    return Z - M @ Q.T - Q @ M.T


@compiled
def _evaluate(C, Q, ineq, x, cuts, centre):  # type: ignore[no-untyped-def]
    """Return minus the augmented dual function, its gradient and the primal matrix."""
    size = C.shape[0]
    sigma = SIGMA / size
    count = cuts.shape[0]
    Z = _slack_matrix(C, ineq, x, cuts) - sigma * centre
    lam, U = np.linalg.eigh(_project(Z, Q))
    negative = np.searchsorted(lam, 0.0)
    W = U[:, :negative] * np.sqrt(-lam[:negative] / sigma)
    X = W @ W.T
    g = np.zeros(x.size)
    g[:size] = np.diag(X) - 1.0
    for t in range(count):
        g[size + t] = 1.0 + _triangle(X, cuts[t])
    for q in range(ineq.shape[0]):
        g[size + count + q] = (ineq[q] * X[0]).sum()
    norm = (lam[:negative] ** 2).sum()
    value = norm / (2.0 * sigma) - x[:size].sum() + x[size : size + count].sum()
    return value, g, X


@compiled
def _find_violated(X):  # type: ignore[no-untyped-def]
    """Return the triangles that X violates, as flat indices (T,), and by how much."""
    size = X.shape[0]
    violated = []
    amounts = []
    for i in range(size):
        for j in range(i + 1, size):
            for k in range(j + 1, size):
                for kind in range(4):
                    amount = -1.0 - _triangle(X, (i, j, k, kind))
                    if amount > LEAST_VIOLATION:
                        violated.append(((i * size + j) * size + k) * 4 + kind)
                        amounts.append(amount)
    return np.array(violated), np.array(amounts)


@dataclass(eq=False)
class Dual:
    """Multipliers of a relaxation over the variables ``free`` (index 0 is the constant spin).

    Attributes:
        x: y (N,), z (T,) and mu (G,) in one vector.
        cuts: (T, 4) triangles: three spins, ascending, and the row of `SIGNS`.
        centre: (N, N) proximal centre: the primal matrix of the last step.
    """

    free: NDArray[np.int64]
    x: Floats
    cuts: NDArray[np.int64]
    centre: NDArray[np.float32]

    def restrict(self, fixed: NDArray[np.int8]) -> Dual:
        """Return the multipliers after fixing more variables (0 or 1 in ``fixed``).

        A fixed spin equals plus or minus the constant spin, so its row merges into row 0 and a
        triangle through it becomes one through 0; triangles that lose two spins are dropped.
        """
        values = fixed[self.free]
        size = self.free.size + 1
        stays = values < 0
        y, z, mu = np.split(self.x, [size, size + len(self.cuts)])
        place = np.append(0, np.cumsum(stays) * stays)
        sign = np.append(1, np.where(stays, 1, 2 * values.astype(np.int64) - 1))
        new = place[self.cuts[:, :3]]
        s = sign[self.cuts[:, :3]]
        alive = (np.diff(np.sort(new, axis=1), axis=1) > 0).all(axis=1) & (z > 0)
        new = new[alive]
        s = s[alive]
        # Pairs (ij, ik, jk) omit the spins k, j and i; flipping a spin flips its two pairs.
        pairs = SIGNS[self.cuts[alive, 3]] * s[:, [0, 0, 1]] * s[:, [1, 2, 2]]
        order = np.argsort(new, axis=1)
        pairs = np.take_along_axis(pairs[:, ::-1], order, axis=1)[:, ::-1]
        kind = 2 * (pairs[:, 0] < 0) + (pairs[:, 1] < 0)
        kept = np.flatnonzero(np.append(True, stays))
        return Dual(
            self.free[stays],
            np.concatenate([np.bincount(place, y, len(kept)), z[alive], mu]),
            np.column_stack([np.take_along_axis(new, order, axis=1), kind]),
            self.centre[np.ix_(kept, kept)],
        )


class Subproblem:
    """The rest of a node: base + h.x + sum J x x over the ``free`` variables, with ``left`` ones.

    Args:
        reduced: problem over all variables; the rows are low <= A x <= high, as there.
        fixed: (V,) values 0, 1 or -1 (free).
        m: total number of ones.
    """

    def __init__(self, reduced: Reduced, fixed: NDArray[np.int8], m: int) -> None:
        free = np.flatnonzero(fixed < 0)
        ones = fixed == 1
        h = reduced.h
        J = reduced.J
        settled = reduced.A @ ones
        self.A: Floats = reduced.A[:, free]
        self.low: Floats = reduced.low - settled
        self.high: Floats = reduced.high - settled
        self.fixed = fixed
        self.m = m
        self.free = free
        self.h: Floats = h[free] + J[np.ix_(free, ones)].sum(axis=1)
        self.J: Floats = J[np.ix_(free, free)]
        self.base = float(h[ones].sum() + J[np.ix_(ones, ones)].sum() / 2)
        self.left = m - int(ones.sum())


def spin_matrix(h: Floats, J: Floats, constant: float) -> Floats:
    """Return C, <C, s s^T> = constant + h.x + sum_{i<j} J_ij x_i x_j with (N,) s = (1, 2 x - 1)."""
    n = h.shape[0]
    C = np.zeros((n + 1, n + 1))
    rows = J.sum(axis=1)
    C[1:, 1:] = J / 8
    C[0, 1:] = C[1:, 0] = h / 4 + rows / 8
    C[0, 0] = constant + h.sum() / 2 + rows.sum() / 8
    return C


class Relaxation:
    """Lower bounds for the subproblems of one reduced problem, shared by all threads.

    Args:
        rows: reduced problem, to tell its equality rows.
        threshold: (1,) read in every round; a bound is not improved beyond it.
        stop: (1,) shared flag.
    """

    def __init__(
        self, rows: Reduced, threshold: Floats, stop: NDArray[np.int64]
    ) -> None:
        self.threshold = threshold
        self.stop = stop
        self.evaluations = 0
        size = np.abs(rows.A).sum(axis=1, initial=0.0)
        self._equal = rows.high - rows.low <= 4e-9 * np.maximum(1.0, size)
        self._roots: dict[int, Dual] = {}

    def _start(self, dual: Dual | None, part: Subproblem) -> Dual:
        """Return the initial multipliers: the parent's, else the root's, else zeros."""
        dual = dual or self._roots.get(part.m)
        if dual is None:
            size = part.free.size + 1
            x = np.zeros(size + 2 * len(part.A))
            centre = np.zeros((size, size), dtype=np.float32)
            return Dual(part.free, x, np.zeros((0, 4), dtype=np.int64), centre)
        return dual if dual.free.size == part.free.size else dual.restrict(part.fixed)

    def _spin_rows(self, part: Subproblem) -> tuple[Floats, Floats]:
        """Return an orthonormal basis Q (N, R) of the equality rows, and rows g.s >= 0 (2 A, N),
        for s = (1, spins)."""
        A = part.A

        def spin(coefficients: Floats, rhs: Floats) -> Floats:
            # a.x = a.(s + 1) / 2, so a.x - rhs is (a.s + sum(a) - 2 rhs) / 2.
            rows = np.column_stack([coefficients.sum(axis=1) - 2 * rhs, coefficients])
            return np.asarray(
                rows / np.maximum(np.abs(rows).max(axis=1), 1e-300)[:, None]
            )

        middle = (part.low + part.high)[self._equal] / 2
        ones = spin(np.ones((1, part.free.size)), np.array([float(part.left)]))
        equal = np.vstack([ones, spin(A[self._equal], middle)])
        # An open end is the sum that no state exceeds.
        low = np.maximum(part.low, np.minimum(A, 0).sum(axis=1))
        high = np.minimum(part.high, np.maximum(A, 0).sum(axis=1))
        ineq = np.vstack([spin(A, low), -spin(A, high)])
        # Always in the same memory order: numba compiles again for another, for ten seconds.
        return np.ascontiguousarray(orth(equal.T, rcond=1e-6)), np.ascontiguousarray(
            ineq
        )

    def bound(
        self, part: Subproblem, parent: Dual | None
    ) -> tuple[float, Floats, Dual]:
        """Return a bound, bounds (2, V) for each value of each variable, and the multipliers.

        The bound is improved until it reaches the threshold or stalls.
        """
        dual = self._start(parent, part)
        size = part.free.size + 1
        C = spin_matrix(part.h, part.J, part.base)
        Q, ineq = self._spin_rows(part)
        x = dual.x
        cuts = dual.cuts
        centre = dual.centre.astype(np.float64)
        X = centre

        sigma = SIGMA / size

        def value(scaled: Floats) -> tuple[float, Floats]:
            # With this scaling, second derivatives are near 1.
            self.evaluations += 1
            nonlocal X
            f, g, X = _evaluate(C, Q, ineq, sigma * scaled, cuts, centre)
            return f / sigma, g

        best = -np.inf
        splits = np.full((2, size - 1), -np.inf)
        for turn in range(ROUNDS):
            maximum = minimize(
                value,
                x / sigma,
                jac=True,
                method="L-BFGS-B",
                bounds=Bounds(np.where(np.arange(x.size) < size, -np.inf, 0.0), np.inf),
                options={"maxiter": ITERATIONS, "maxcor": 12, "ftol": 0.0, "gtol": 0.0},
            )
            x = sigma * maximum.x
            centre = X.copy()
            z = x[size : size + len(cuts)]
            Z = _project(_slack_matrix(C, ineq, x, cuts), Q)
            # The large multiple of Q Q^T sorts the directions of the equality rows last.
            lam, U = np.linalg.eigh(Z + np.abs(Z).sum() * Q @ Q.T)
            lam = lam[: size - Q.shape[1]]
            U = U[:, : size - Q.shape[1]]
            dual_sum = float(x[:size].sum() - z.sum())
            lower = dual_sum + size * min(0.0, float(lam[0]))
            gain = lower - best
            best = max(lower, best)
            left = float(self.threshold[0]) - best
            if left <= 0 or self.stop[0]:
                break
            if turn + 1 == ROUNDS or (turn >= 2 and gain < GIVE_UP * left):
                splits = _split_bounds(dual_sum, lam, U)
                break
            kept = z > 0
            cuts = cuts[kept]
            violated, amounts = _find_violated(X)
            shape = (size, size, size, 4)
            new = ~np.isin(violated, np.ravel_multi_index(tuple(cuts.T), shape))
            worst = np.argsort(-amounts[new], kind="stable")[:CUTS_PER_ROUND]
            picked = np.unravel_index(violated[new][worst], shape)
            x = np.concatenate(
                [x[:size], z[kept], np.zeros(len(worst)), x[size + z.size :]]
            )
            cuts = np.vstack([cuts, np.column_stack(picked)])
            if not len(worst):
                splits = _split_bounds(dual_sum, lam, U)
                break
        new_dual = Dual(part.free, x, cuts, centre.astype(np.float32))
        self._roots.setdefault(part.m, new_dual)
        return best, splits, new_dual


def _split_bounds(base: float, lam: Floats, W: Floats) -> Floats:
    """Return lower bounds (2, V) for s_i = -1 and +1 from the eigenvectors W of a slack matrix.

    For binary s the energy is at least s^T Z s + sum(y) - sum(z). With Z + delta I positive
    definite on the rows' complement, its minimum over real s with s_0 = 1 and s_i fixed is a
    Schur complement of the inverse, for all i at once after one eigenvalue decomposition; delta
    lowers the bound by delta N. Several values of delta are tried; the bound is valid for each.
    """
    best = np.full((2, len(W) - 1), -np.inf)
    for power in range(5):
        delta = max(0.0, -lam[0]) + max(abs(lam[0]), 1e-9) * 4.0 ** (power - 2)
        scaled = W / (lam + delta)
        a = W[0] @ scaled[0]
        b = scaled[1:] @ W[0]
        c = (W[1:] * scaled[1:]).sum(axis=1)
        det = a * c - b * b
        for side, sign in enumerate((-1.0, 1.0)):
            with np.errstate(divide="ignore", invalid="ignore"):
                value = base - delta * len(W) + (c - 2 * sign * b + a) / det
            best[side] = np.where(
                det > 1e-12 * a * c, np.maximum(best[side], value), best[side]
            )
    return best
