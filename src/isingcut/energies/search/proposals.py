"""Where new states come from: exact minima of a surrogate, and moves around the best states."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable

import numpy as np

from isingcut.energies.search.surrogate import Surrogate
from isingcut.energies.search.targets import Target
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.solvers import solve
from isingcut.ising.states import Bools, Floats, States

EXACT_UP_TO = 40
"""Blocks up to which a proof costs less than tabu search; either finds the minimum."""

FEW = 20_000
"""States of a target that may be listed one by one."""


def lowest(hamiltonian: Hamiltonian, target: Target, k: int, seed: int) -> States:
    """The ``k`` lowest states of a Hamiltonian among the target's: (<= k, N)."""
    problem = target.problem(hamiltonian)
    if hamiltonian.n <= EXACT_UP_TO:
        return solve(problem, "exact", k, threads=1).states
    return solve(problem, "tabu", k, seed=seed).states


def every(target: Target, n: int) -> States | None:
    """All states of a target, or None where there are more than `FEW`."""
    if target.low != target.high or math.comb(n, target.low) > FEW:
        return None
    chosen = list(itertools.combinations(range(n), target.low))
    states = np.zeros((len(chosen), n), dtype=bool)
    states[np.arange(len(chosen))[:, None], np.array(chosen)] = True
    return states[target.feasible(states)]


def windows(hamiltonian: Hamiltonian, target: Target, count: int) -> States:
    """The ``count`` runs of neighbouring blocks that a Hamiltonian likes best."""
    n, size = hamiltonian.n, target.low
    states = np.zeros((n - size + 1, n), dtype=bool)
    for start, state in enumerate(states):
        state[start : start + size] = True
    states = states[target.feasible(states)]
    return states[np.argsort(hamiltonian.energies(states), kind="stable")[:count]]


def thompson(
    surrogate: Surrogate,
    target: Target,
    count: int,
    rng: np.random.Generator,
    heat: float = 1.0,
) -> States:
    """Ground states of ``count`` Hamiltonians drawn from the posterior."""
    seeds = rng.integers(2**31, size=count)
    return np.concatenate(
        [lowest(surrogate.sample(rng, heat), target, 1, int(seed)) for seed in seeds]
    )


def exchanges(state: Bools, target: Target) -> States:
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


def flips(state: Bools) -> States:
    """(N, N) all states that differ in one block."""
    return np.asarray(state[None] ^ np.eye(len(state), dtype=bool))


def by_slope(state: Bools, surrogate: Surrogate, slopes: Floats, target: Target) -> States:
    """Exchanges around a state, the most promising first.

    What goes is priced by the surrogate, which measured removals inform; what comes back by the
    slope of its gate.

    Args:
        slopes: (N,) slopes of the loss in the gates at ``state``.
    """
    moves = exchanges(state, target)
    if not len(moves):
        return moves
    gone = moves & ~state
    removal = surrogate.mean.energies(state | gone)
    gain = ((state & ~moves) * slopes).sum(1)
    return moves[np.argsort(removal + gain, kind="stable")]


def by_bound(surrogate: Surrogate, states: States, count: int, width: float = 1.0) -> States:
    """The ``count`` states of lowest posterior mean minus ``width`` standard deviations."""
    if not len(states):
        return states
    bound = surrogate.mean.energies(states) - width * surrogate.deviation(states)
    return states[np.argsort(bound, kind="stable")[:count]]


def grown(states: Iterable[Bools], target: Target) -> States:
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


def unseen(states: States, seen: Callable[[Bools], bool], count: int) -> list[Bools]:
    """The first ``count`` distinct states that were not measured yet."""
    out: dict[bytes, Bools] = {}
    for state in states:
        if len(out) == count:
            break
        if not seen(state):
            out.setdefault(state.tobytes(), state)
    return list(out.values())
