"""The problem as solvers work on it: fixed blocks gone, tied blocks merged, rows tightened."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isingcut.ising.constraints import LinearConstraint, count
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.problem import Problem, is_count
from isingcut.ising.states import Bools, Floats, States


@dataclass(frozen=True, eq=False)
class Reduced:
    """Minimise c + h.y + sum_{i<j} J_ij y_i y_j over y in {0,1}^V with m_low <= sum y <= m_high,
    low <= A y <= high, and y_i y_j = 0 for ``exclusive`` (V, V) pairs; V <= N variables, each one
    block or a group that goes together.

    ``exclusive`` is what any row says of two variables; a row that says no more than that ("at
    most one of these") is not in A. J is 0 there.

    ``lift`` (V, N) and ``base`` (N,) give the state back: x = base + y @ lift.
    """

    h: Floats
    J: Floats
    c: float
    A: Floats
    low: Floats
    high: Floats
    exclusive: Bools
    m_low: int
    m_high: int
    lift: NDArray[np.int8]
    base: NDArray[np.int8]

    @property
    def n(self) -> int:
        """Number of free variables V."""
        return int(self.h.shape[0])

    def expand(self, y: NDArray[np.generic]) -> States:
        """States (S, N) of reduced states (S, V)."""
        x = self.base[None] + np.asarray(y, dtype=np.int8) @ self.lift
        return x.astype(np.bool_)

    def shrink(self, states: States) -> NDArray[np.uint8]:
        """Reduced states (S, V) of feasible states (S, N)."""
        first = np.argmax(self.lift, axis=1) if self.n else np.zeros(0, dtype=np.int64)
        return np.asarray(states)[:, first].astype(np.uint8)

    def as_problem(self) -> Problem:
        """The same as a `Problem` over the V variables (without c)."""
        rows = []
        if self.m_low == self.m_high:
            rows.append(count(self.n, self.m_low))
        for r, (row, low, high) in enumerate(zip(self.A, self.low, self.high, strict=True)):
            slack = 4e-9 * max(1.0, float(np.abs(row).sum()))
            if high - low <= slack:
                rows.append(LinearConstraint(f"row {r}", row, "==", (low + high) / 2))
                continue
            if np.isfinite(low):
                rows.append(LinearConstraint(f"row {r} low", row, ">=", low))
            if np.isfinite(high):
                rows.append(LinearConstraint(f"row {r} high", row, "<=", high))
        for i, j in zip(*np.nonzero(np.triu(self.exclusive)), strict=True):
            pair = np.zeros(self.n)
            pair[[i, j]] = 1.0
            rows.append(LinearConstraint(f"exclusive {i} {j}", pair, "<=", 1))
        return Problem(Hamiltonian(self.h, self.J), rows)

    def count_states(self) -> int:
        """An upper bound on the number of feasible states; exact for disjoint exact counts."""
        rest = np.ones(self.n, dtype=np.bool_)
        product, wanted = 1, 0
        for row, low, high in zip(self.A, self.low, self.high, strict=True):
            support = row != 0
            one = row[support][0] if support.any() else 0.0
            if one == 0 or (row[support] != one).any() or (support & ~rest).any():
                continue
            least, most = sorted((low / one, high / one))
            if not np.isfinite([least, most]).all() or math.ceil(least) != math.floor(most):
                continue
            m = math.ceil(least)
            product *= math.comb(int(support.sum()), m)
            rest &= ~support
            wanted += m
        r = int(rest.sum())
        counts = (m - wanted for m in range(self.m_low, self.m_high + 1))
        return product * sum(math.comb(r, m) for m in counts if 0 <= m <= r)


def reduce(problem: Problem) -> Reduced:
    """Fix what the rows force, merge what they tie, and derive the range of the count.

    Raises:
        InfeasibleError: there is no feasible state.
    """
    problem.check()
    n = problem.n
    parent, tied = _ties(problem)
    classes = sorted(set(parent))
    lift = np.zeros((len(classes), n), dtype=np.int8)
    for row, root in zip(lift, classes, strict=True):
        row[[i for i in range(n) if parent[i] == root]] = 1
    kept = [row for row in problem.constraints if not any(row is other for other in tied)]
    wide = lift.astype(np.float64)
    matrix = np.array([row.coefficients for row in kept]).reshape(len(kept), n) @ wide.T
    interval: Floats = np.array([row.interval() for row in kept]).reshape(len(kept), 2)
    fixed = np.full(len(classes), -1, dtype=np.int8)
    propagate(matrix, interval[:, 0], interval[:, 1], fixed)
    free = fixed < 0
    ones = (fixed == 1).astype(np.int8)
    base = ones @ lift
    lift = lift[free]
    shift = matrix @ ones
    low, high = interval[:, 0] - shift, interval[:, 1] - shift
    matrix = matrix[:, free]
    useful = (np.minimum(matrix, 0).sum(axis=1) < low) | (np.maximum(matrix, 0).sum(axis=1) > high)

    ham = problem.hamiltonian
    field = ham.h + ham.J @ base
    wide = lift.astype(np.float64)
    J = wide @ ham.J @ wide.T
    h = wide @ field + np.diagonal(J) / 2
    np.fill_diagonal(J, 0.0)
    c = ham.energy(base)

    v = int(free.sum())
    m_low, m_high = 0, v
    rows: list[int] = []
    for r in np.flatnonzero(useful):
        values = matrix[r]
        centre = (low[r] + high[r]) / 2
        if v and np.isfinite(centre):
            as_row = LinearConstraint("", values, "==", centre)
            if is_count(as_row):
                m = round(centre / values[0])
                m_low, m_high = max(m_low, m), min(m_high, m)
                continue
        rows.append(int(r))
    if rows and m_low < m_high:
        m_low, m_high = _cardinality(matrix[rows], low[rows], high[rows])
    exclusive, stay = _pairs(matrix, low, high, rows)
    J[exclusive] = 0.0
    return Reduced(
        np.ascontiguousarray(h),
        np.ascontiguousarray(J),
        c,
        np.ascontiguousarray(matrix[stay]),
        np.ascontiguousarray(low[stay]),
        np.ascontiguousarray(high[stay]),
        exclusive,
        m_low,
        m_high,
        lift,
        base.astype(np.int8),
    )


def _ties(problem: Problem) -> tuple[list[int], list[LinearConstraint]]:
    """Blocks that equality rows x_a = x_b tie together, as roots, and those rows."""
    parent = list(range(problem.n))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    tied = []
    for row in problem.constraints:
        support = np.flatnonzero(row.coefficients)
        if row.sense == "==" and row.rhs == 0 and support.size == 2:
            a, b = int(support[0]), int(support[1])
            if row.coefficients[a] == -row.coefficients[b]:
                a, b = sorted((root(a), root(b)))
                parent[b] = a
                tied.append(row)
    return [root(i) for i in range(problem.n)], tied


def _pairs(matrix: Floats, low: Floats, high: Floats, rows: list[int]) -> tuple[Bools, list[int]]:
    """The pairs (V, V) that a row forbids, and the rows that ask for more than their pairs."""
    v = matrix.shape[1]
    exclusive = np.zeros((v, v), dtype=np.bool_)
    more = []
    for r in rows:
        said = np.zeros((v, v), dtype=np.bool_)
        whole = False
        for row, most, least in ((matrix[r], high[r], low[r]), (-matrix[r], -low[r], -high[r])):
            plus = np.maximum(row, 0)
            with_both = np.minimum(row, 0).sum() + plus[:, None] + plus
            said |= with_both > most
            support = row != 0
            single = (row >= 0).all() and row.max(initial=0.0) <= most and least <= 0
            others = said | ~support | ~support[:, None] | np.eye(v, dtype=np.bool_)
            whole |= bool(single and others.all())
        np.fill_diagonal(said, False)
        exclusive |= said
        if not whole:
            more.append(r)
    return exclusive, more


def propagate(matrix: Floats, low: Floats, high: Floats, fixed: NDArray[np.int8]) -> bool:
    """Fix, in place, the free variables (-1) that a row forces; False if a row cannot be met."""
    while True:
        free = fixed < 0
        settled = matrix @ (fixed == 1)
        rest = matrix * free
        least = settled + np.minimum(rest, 0).sum(axis=1)
        most = settled + np.maximum(rest, 0).sum(axis=1)
        if (least > high).any() or (most < low).any():
            return False
        # The unfavourable value of one variable moves the row's extreme by its coefficient.
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


def _cardinality(matrix: Floats, low: Floats, high: Floats) -> tuple[int, int]:
    v = matrix.shape[1]
    rows = []
    for row, least, most in zip(matrix, low, high, strict=True):
        if np.isfinite(least):
            rows.append(LinearConstraint("", row, ">=", least))
        if np.isfinite(most):
            rows.append(LinearConstraint("", row, "<=", most))
    return Problem(Hamiltonian(np.zeros(v), np.zeros((v, v))), rows).cardinality
