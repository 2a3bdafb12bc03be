"""Targets of a search: the states that one set of constraints allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from isingcut.errors import InputError
from isingcut.ising.constraints import LinearConstraint, count
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.problem import Problem
from isingcut.ising.states import Bools, States


@dataclass(frozen=True, eq=False)
class Target:
    """One removal.

    Attributes:
        label: the removal as typed, for example ``"8"`` or ``"params=25%"``.
        rows: its constraints over N blocks.
        low, high: fewest and most removed blocks of a feasible state.
        size: removed blocks of a feasible state with blocks of average cost. A budget allows states
            with many more removed blocks; the good ones are near this size.
    """

    label: str
    rows: tuple[LinearConstraint, ...]
    low: int
    high: int
    size: int

    def __repr__(self) -> str:
        return f"Target({self.label}: {'; '.join(row.describe() for row in self.rows)})"

    @classmethod
    def of(cls, label: str, rows: Sequence[LinearConstraint], n: int) -> Target:
        """Make a target from its rows.

        Raises:
            InfeasibleError: no state satisfies them.
        """
        low, high = _blank(n, rows).cardinality
        enough = [
            math.ceil((row.rhs - row.tolerance) / row.coefficients.mean())
            for row in rows
            if row.sense == ">=" and row.coefficients.min() >= 0 and row.coefficients.any()
        ]
        return cls(label, tuple(rows), low, high, min(high, max([low, *enough])))

    @classmethod
    def count(cls, n: int, remove: int) -> Target:
        """Make the target to remove exactly ``remove`` of ``n`` blocks.

        Raises:
            InputError: ``remove`` is none or all of the blocks.
        """
        if not 1 <= remove < n:
            raise InputError(f"cannot remove {remove} of {n} blocks; expected 1 to {n - 1}")
        return cls.of(str(remove), [count(n, remove)], n)

    def problem(self, hamiltonian: Hamiltonian) -> Problem:
        """Return the problem to minimise ``hamiltonian`` over this target's states."""
        return Problem(hamiltonian, self.rows)

    def feasible(self, states: States) -> Bools:
        """Return (S,) which of the states (S, N) satisfy every row."""
        return _blank(states.shape[1], self.rows).feasible(states)

    def extendable(self, states: States) -> Bools:
        """Return (S,) which states exceed no row yet, so that a greedy path may pass through."""
        result = np.ones(len(states), dtype=bool)
        for row in self.rows:
            if row.sense != ">=" and (row.coefficients >= 0).all():
                result &= states @ row.coefficients <= row.rhs + row.tolerance
        return result

    def near(self, states: States, distance: int) -> Bools:
        """Return (S,) which states have about as many removed blocks as this target's good ones."""
        size = states.sum(1)
        most = min(self.high, self.size + 2)
        return np.asarray((size >= self.low - distance) & (size <= most + distance))


def _blank(n: int, rows: Sequence[LinearConstraint]) -> Problem:
    return Problem(Hamiltonian(np.zeros(n), np.zeros((n, n))), rows)
