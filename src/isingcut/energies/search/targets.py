"""What a search looks for: the states that one set of constraints allows."""

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
        label: what the user calls it, for example ``"8"`` or ``"params=25%"``.
        rows: its constraints over N blocks.
        low, high: fewest and most blocks of a feasible state.
        size: blocks of a feasible state of average ones. Where a budget only asks for enough,
            many more may go than a good state removes; this is about where the good ones are.
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
        """A target from its rows.

        Raises:
            InfeasibleError: no state obeys them.
        """
        low, high = _blank(n, rows).cardinality
        asked = [
            math.ceil((row.rhs - row.tolerance) / row.coefficients.mean())
            for row in rows
            if row.sense == ">=" and row.coefficients.min() >= 0 and row.coefficients.any()
        ]
        return cls(label, tuple(rows), low, high, min(high, max([low, *asked])))

    @classmethod
    def count(cls, n: int, remove: int) -> Target:
        """Exactly ``remove`` of ``n`` blocks.

        Raises:
            InputError: none or all of them.
        """
        if not 1 <= remove < n:
            raise InputError(f"cannot remove {remove} of {n} blocks; expected 1 to {n - 1}")
        return cls.of(str(remove), [count(n, remove)], n)

    def problem(self, hamiltonian: Hamiltonian) -> Problem:
        """Minimise ``hamiltonian`` over this target's states."""
        return Problem(hamiltonian, self.rows)

    def feasible(self, states: States) -> Bools:
        """(S,) which of the states (S, N) obey every row."""
        return _blank(states.shape[1], self.rows).feasible(states)

    def extendable(self, states: States) -> Bools:
        """(S,) which states exceed no row yet: those a greedy path may pass through."""
        result = np.ones(len(states), dtype=bool)
        for row in self.rows:
            if row.sense != ">=" and (row.coefficients >= 0).all():
                result &= states @ row.coefficients <= row.rhs + row.tolerance
        return result

    def near(self, states: States, distance: int) -> Bools:
        """(S,) which states have a number of removed blocks close to this target's good ones."""
        size = states.sum(1)
        most = min(self.high, self.size + 2)
        return np.asarray((size >= self.low - distance) & (size <= most + distance))


def _blank(n: int, rows: Sequence[LinearConstraint]) -> Problem:
    return Problem(Hamiltonian(np.zeros(n), np.zeros((n, n))), rows)
