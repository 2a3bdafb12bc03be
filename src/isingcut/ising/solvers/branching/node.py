"""Subproblems of the exact search: some blocks fixed, multipliers inherited from the parent."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

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
