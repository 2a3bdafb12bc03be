"""A Hamiltonian with its constraints: the input of every solver.

A small mixed-integer program without an objective (HiGHS through scipy) decides exactly whether
linear rows over binaries are feasible. If they are not, a deletion filter finds a minimal set of
conflicting rows for the message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from isingcut.errors import InfeasibleError, InputError
from isingcut.ising.constraints import LinearConstraint
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.states import Bools, Floats

if TYPE_CHECKING:
    import dimod


@dataclass(frozen=True, eq=False)
class Problem:
    """Minimise the energy over the states that satisfy every constraint.

    Args:
        hamiltonian: the energy over N blocks.
        constraints: rows over the same N blocks.

    Raises:
        InputError: not a row, or a row of another length than the Hamiltonian.

    Examples:
        >>> from isingcut import constraints
        >>> energy = isingcut.Hamiltonian.from_quadratic(np.diag([3.0, 1.0, 2.0]))
        >>> problem = isingcut.Problem(energy, [constraints.count(3, 2)])
        >>> problem.feasible([[1, 1, 0], [1, 1, 1]]).tolist()
        [True, False]
    """

    hamiltonian: Hamiltonian
    constraints: Sequence[LinearConstraint] = ()

    def __post_init__(self) -> None:
        vars(self).update(constraints=tuple(self.constraints))
        for row in self.constraints:
            if not isinstance(row, LinearConstraint):
                raise InputError(
                    f"expected rows; unpack a list of rows with *; got {row!r:.60}"
                )
            if row.coefficients.shape != (self.n,):
                raise InputError(
                    f"constraint {row.name!r} is for {row.coefficients.shape[0]} blocks, but the "
                    f"Hamiltonian has {self.n}"
                )

    @property
    def n(self) -> int:
        """The number of blocks N."""
        return self.hamiltonian.n

    @cached_property
    def rows(self) -> tuple[Floats, Floats, Floats]:
        """The constraints as low <= A x <= high: A (R, N), low (R,) and high (R,)."""
        matrix = np.array([row.coefficients for row in self.constraints])
        interval = np.array([row.interval() for row in self.constraints])
        low, high = interval.reshape(-1, 2).T
        return matrix.reshape(-1, self.n), low, high

    def feasible(self, states: ArrayLike) -> Bools:
        """Return (S,) whether each state of (S, N) satisfies every constraint."""
        x = np.asarray(states, dtype=np.float64)
        if x.ndim != 2 or x.shape[1] != self.n:
            raise InputError(f"states must have shape (S, {self.n}), got {x.shape}")
        matrix, low, high = self.rows
        sums = x @ matrix.T
        return np.asarray(((sums >= low) & (sums <= high)).all(axis=1))

    def violations(self, state: ArrayLike) -> list[str]:
        """Return the constraints that one state (N,) violates, in words."""
        x = np.asarray(state)[None]
        return [row.describe() for row in self.constraints if not row.satisfied(x)[0]]

    # feasibility --------------------------------------------------------------------------

    @cached_property
    def cardinality(self) -> tuple[int, int]:
        """The fewest and most removed blocks of any feasible state.

        Raises:
            InfeasibleError: there is no feasible state.
        """
        least = self._find_lowest(np.ones(self.n))
        most = self._find_lowest(-np.ones(self.n))
        return int(least.sum()), int(most.sum())

    def a_state(self) -> Bools:
        """Return the feasible state (N,) with the lowest linear energy h.x.

        Raises:
            InfeasibleError: there is no feasible state.
        """
        return self._find_lowest(self.hamiltonian.h)

    def _find_lowest(self, objective: Floats) -> Bools:
        state = _extreme(self, objective)
        if state is None:
            self.check()
            raise InfeasibleError("no state satisfies all constraints")
        return state

    def has_states(self) -> bool:
        """Whether any state is feasible."""
        return _extreme(self, np.zeros(self.n)) is not None

    def check(self) -> None:
        """Raise an error if no state is feasible.

        Raises:
            InfeasibleError: no state is feasible; lists a minimal set of conflicting constraints.
        """
        if self.has_states():
            return
        clash = list(self.constraints)
        for row in self.constraints:
            without = [other for other in clash if other is not row]
            if not Problem(self.hamiltonian, without).has_states():
                clash = without
        names: dict[str, list[str]] = {}
        for row in clash:
            names.setdefault(row.reason, []).append(row.name)
        raise InfeasibleError(
            "no state satisfies all constraints; these conflict: "
            + "; ".join(
                ", ".join(of) + f" ({why})" * bool(why) for why, of in names.items()
            )
            + "; relax one of them"
        )

    # dimod --------------------------------------------------------------------------------

    def to_cqm(self) -> dimod.ConstrainedQuadraticModel:
        """Return a dimod CQM over the variables 0 .. N-1 with every constraint as a row."""
        import dimod

        cqm = dimod.ConstrainedQuadraticModel.from_bqm(self.hamiltonian.to_bqm())
        for place, row in enumerate(self.constraints):
            label = (
                row.name if row.name not in cqm.constraints else f"{row.name} #{place}"
            )
            terms = [(i, a) for i, a in enumerate(row.coefficients.tolist()) if a]
            cqm.add_constraint_from_iterable(terms, row.sense, rhs=row.rhs, label=label)
        return cqm


def read_count(row: LinearConstraint) -> int | None:
    """Return the number of ones that the row fixes, or None."""
    first = row.coefficients[0]
    if row.sense != "==" or first == 0 or not (row.coefficients == first).all():
        return None
    m = round(row.rhs / first)
    return m if abs(row.rhs - m * first) <= row.tolerance else None


def _extreme(problem: Problem, objective: Floats) -> Bools | None:
    """Return a feasible state that minimises ``objective``.x, or None."""
    n = problem.n
    if not problem.constraints:
        return objective < 0
    if (
        len(problem.constraints) == 1
        and (m := read_count(problem.constraints[0])) is not None
    ):
        if not 0 <= m <= n:
            return None
        state = np.zeros(n, dtype=np.bool_)
        state[np.argsort(objective, kind="stable")[:m]] = True
        return state
    from scipy.optimize import Bounds, milp
    from scipy.optimize import LinearConstraint as Row

    matrix, low, high = problem.rows
    # Scale each row to a largest coefficient of 1: HiGHS tests feasibility with an absolute
    # tolerance of 1e-7, which is far too strict for a budget in bytes, too loose for gigabytes.
    size = np.maximum(np.abs(matrix).max(axis=1), 1e-300)
    result = milp(
        objective,
        integrality=np.ones(n),
        bounds=Bounds(0, 1),
        constraints=Row(matrix / size[:, None], low / size, high / size),
    )
    return None if result.x is None else result.x > 0.5
