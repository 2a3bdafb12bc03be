"""Where new states come from: exact minima of a surrogate, and moves around the best states."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from isingcut.hamiltonian import Hamiltonian
from isingcut.search.surrogate import Surrogate
from isingcut.search.targets import Target
from isingcut.solvers import solve

States = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
State = npt.NDArray[np.bool_]

EXACT_UP_TO = 40
"""Blocks up to which a proof costs less than tabu search; either finds the minimum."""


def lowest(hamiltonian: Hamiltonian, target: Target, k: int, seed: int) -> States:
    """The ``k`` lowest states of a Hamiltonian among the target's: (<= k, N)."""
    problem = target.problem(hamiltonian)
    if hamiltonian.n <= EXACT_UP_TO:
        return solve(problem, "exact", k).states
    return solve(problem, "tabu", k, seed=seed).states


def thompson(
    surrogate: Surrogate, target: Target, count: int, rng: np.random.Generator
) -> States:
    """Ground states of ``count`` Hamiltonians drawn from the posterior."""
    draws = [
        lowest(surrogate.sample(rng), target, 1, int(rng.integers(2**31))) for _ in range(count)
    ]
    return np.concatenate(draws)


def exchanges(state: State, target: Target) -> States:
    """Every feasible state one exchange, one removal or one re-insertion away."""
    gone, here = np.flatnonzero(state), np.flatnonzero(~state)
    rows = []
    for r in gone:
        for k in here:
            swapped = state.copy()
            swapped[r], swapped[k] = False, True
            rows.append(swapped)
    rows += list(flips(state))
    found = np.array(rows, dtype=bool).reshape(-1, len(state))
    return found[target.feasible(found)]


def flips(state: State) -> States:
    """(N, N) all states that differ in one block."""
    return np.asarray(state[None] ^ np.eye(len(state), dtype=bool))


def additive(
    state: State, loss: float, marginals: Callable[[State], float | None], target: Target
) -> tuple[States, Floats]:
    """Exchanges around a state, predicted from its measured single flips.

    D(x - r + k) is taken as D(x - r) + D(x + k) - D(x): N measurements predict all M (N - M)
    exchanges.

    Args:
        marginals: the measured loss of a state, or None.
    """
    near = {int(np.flatnonzero(f ^ state)[0]): marginals(f) for f in flips(state)}
    moves = exchanges(state, target)
    values = []
    for move in moves:
        parts = [near[int(i)] for i in np.flatnonzero(move ^ state)]
        known = [p for p in parts if p is not None]
        whole = len(known) == len(parts)
        values.append(sum(known) - (len(known) - 1) * loss if whole else np.inf)
    return moves, np.array(values, dtype=np.float64)


def by_bound(surrogate: Surrogate, states: States, count: int, width: float = 1.0) -> States:
    """The ``count`` states of lowest posterior mean minus ``width`` standard deviations."""
    if not len(states):
        return states
    bound = surrogate.mean.energies(states) - width * surrogate.deviation(states)
    return states[np.argsort(bound, kind="stable")[:count]]


def grown(states: Iterable[State], target: Target) -> States:
    """All states with one more block removed that exceed no row of the target."""
    rows = []
    for state in states:
        for k in np.flatnonzero(~state):
            child = state.copy()
            child[k] = True
            rows.append(child)
    if not rows:
        return np.zeros((0, 0), dtype=bool)
    found = np.unique(np.array(rows, dtype=bool), axis=0)
    return found[target.extendable(found)]


def unseen(states: States, seen: Callable[[State], bool], count: int) -> list[State]:
    """The first ``count`` distinct states that were not measured yet."""
    out: dict[bytes, State] = {}
    for state in states:
        if len(out) == count:
            break
        if not seen(state):
            out.setdefault(state.tobytes(), state)
    return list(out.values())
