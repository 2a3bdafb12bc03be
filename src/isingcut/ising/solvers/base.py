"""The interface of solvers: `Solver`, its result `Solution`, and the reduced problem.

A solver is a frozen dataclass of options with `solve(problem, k)`. `reduce` drops fixed blocks and
redundant rows, merges tied blocks and bounds the number of ones.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from isingcut.ising.constraints import LinearConstraint, count
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.problem import Problem, read_count
from isingcut.ising.states import Floats, States


@dataclass(frozen=True, eq=False)
class Solution:
    """The result of a solver; `isingcut.ising.spectrum.Spectrum` checks and ranks it.

    Args:
        states: (S, N) bool, all feasible; duplicates and any order are allowed.
        lower_bound: proven lower bound on the ground-state energy, or None.
        proven: whether the states contain the k lowest (or all, if there are fewer).
        info: JSON-able statistics of the run: nodes, restarts, dropped samples.
    """

    states: States
    lower_bound: float | None = None
    proven: bool = False
    info: Mapping[str, Any] = field(default_factory=dict)


class Solver(Protocol):
    """The interface of a solver."""

    def solve(self, problem: Problem, k: int) -> Solution:
        """Find up to ``k`` low-energy feasible states of ``problem``.

        Raises:
            InfeasibleError: the problem has no feasible state.
        """
        ...


@dataclass(frozen=True, eq=False)
class Reduced:
    """The reduced problem: minimise c + h.y + sum_{i<j} J_ij y_i y_j over y in {0,1}^V, with
    m_low <= sum y <= m_high and low <= A y <= high.

    Each of the V <= N variables is one block or a group of blocks that are removed together.
    ``lift`` (V, N) and ``base`` (N,) convert y to a state: x = base + y @ lift.
    """

    h: Floats
    J: Floats
    c: float
    A: Floats
    low: Floats
    high: Floats
    m_low: int
    m_high: int
    lift: NDArray[np.int8]
    base: NDArray[np.int8]

    @property
    def n(self) -> int:
        """The number of free variables V."""
        return int(self.h.shape[0])

    def expand(self, y: NDArray[np.generic]) -> States:
        """Convert reduced states (S, V) to states (S, N)."""
        x = self.base[None] + np.asarray(y, dtype=np.int8) @ self.lift
        return x.astype(np.bool_)

    def as_problem(self) -> Problem:
        """Return a `Problem` over the V variables (without c)."""
        rows = _as_rows(self.A, self.low, self.high)
        if self.m_low == self.m_high:
            rows.insert(0, count(self.n, self.m_low))
        return Problem(Hamiltonian(self.h, self.J), rows)

    def count_states(self) -> int:
        """Count the states with an allowed number of ones; not all of them satisfy the rows."""
        return sum(math.comb(self.n, m) for m in range(self.m_low, self.m_high + 1))


def reduce(problem: Problem) -> Reduced:
    """Fix the variables that the rows force, merge tied ones, and bound the number of ones.

    Raises:
        InfeasibleError: there is no feasible state.
    """
    # Imported here because `--help` does not need it.
    from scipy.sparse.csgraph import connected_components

    problem.check()
    matrix, low, high = problem.rows
    tied = np.array([_is_tie(row) for row in problem.constraints], dtype=np.bool_)
    pairs = np.abs(matrix[tied])
    classes, group = connected_components(pairs.T @ pairs, directed=False)
    lift = (np.arange(classes)[:, None] == group).astype(np.int8)
    wide = lift.astype(np.float64)
    matrix = matrix[~tied] @ wide.T
    fixed = np.full(classes, -1, dtype=np.int8)
    propagate(matrix, low[~tied], high[~tied], fixed)
    free = fixed < 0
    ones = (fixed == 1).astype(np.int8)
    base = ones @ lift
    lift = lift[free]
    shift = matrix @ ones
    low = low[~tied] - shift
    high = high[~tied] - shift
    matrix = matrix[:, free]
    useful = (np.minimum(matrix, 0).sum(axis=1) < low) | (
        np.maximum(matrix, 0).sum(axis=1) > high
    )

    ham = problem.hamiltonian
    field = ham.h + ham.J @ base
    wide = lift.astype(np.float64)
    J = wide @ ham.J @ wide.T
    h = wide @ field + np.diagonal(J) / 2
    np.fill_diagonal(J, 0.0)
    c = ham.energy(base)

    v = int(free.sum())
    m_low = 0
    m_high = v
    rows: list[int] = []
    for r in np.flatnonzero(useful):
        centre = (low[r] + high[r]) / 2
        m = None
        if np.isfinite(centre):
            m = read_count(LinearConstraint("", matrix[r], "==", centre))
        if m is None:
            rows.append(int(r))
        else:
            m_low = max(m_low, m)
            m_high = min(m_high, m)
    if rows and m_low < m_high:
        blank = Hamiltonian(np.zeros(v), np.zeros((v, v)))
        m_low, m_high = Problem(
            blank, _as_rows(matrix[rows], low[rows], high[rows])
        ).cardinality
    # The columns were picked from `matrix`; compiled code takes one memory order.
    A = np.ascontiguousarray(matrix[rows])
    return Reduced(h, J, c, A, low[rows], high[rows], m_low, m_high, lift, base)


def _is_tie(row: LinearConstraint) -> bool:
    """Whether a row means x_a = x_b for two blocks."""
    values = row.coefficients[row.coefficients != 0]
    return row.sense == "==" and row.rhs == 0 and values.size == 2 and not values.sum()


def _as_rows(matrix: Floats, lows: Floats, highs: Floats) -> list[LinearConstraint]:
    """Return the constraints low <= A y <= high."""
    rows = []
    for r, (row, low, high) in enumerate(zip(matrix, lows, highs, strict=True)):
        if high - low <= 4e-9 * max(1.0, float(np.abs(row).sum())):
            rows.append(LinearConstraint(f"row {r}", row, "==", (low + high) / 2))
            continue
        if np.isfinite(low):
            rows.append(LinearConstraint(f"row {r} low", row, ">=", low))
        if np.isfinite(high):
            rows.append(LinearConstraint(f"row {r} high", row, "<=", high))
    return rows


def propagate(
    matrix: Floats, low: Floats, high: Floats, fixed: NDArray[np.int8]
) -> bool:
    """Fix in place the free variables (-1) that a row forces; return False if a row cannot hold."""
    while True:
        free = fixed < 0
        settled = matrix @ (fixed == 1)
        rest = matrix * free
        least = settled + np.minimum(rest, 0).sum(axis=1)
        most = settled + np.maximum(rest, 0).sum(axis=1)
        if (least > high).any() or (most < low).any():
            return False
        # The unfavourable value of a variable changes the row's extreme sum by its coefficient.
        over = least[:, None] + np.abs(rest) > high[:, None]
        under = most[:, None] - np.abs(rest) < low[:, None]
        not_one = (((rest > 0) & over) | ((rest < 0) & under)).any(axis=0)
        not_zero = (((rest < 0) & over) | ((rest > 0) & under)).any(axis=0)
        if (not_one & not_zero).any():
            return False
        if not (not_one | not_zero).any():
            return True
        fixed[not_one] = 0
        fixed[not_zero] = 1
