"""Propose new states: exact minima of a surrogate, and moves around the best states."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable

import numpy as np

from isingcut.energies.search.surrogate import Surrogate
from isingcut.energies.search.targets import Target
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.solvers import solve
from isingcut.ising.states import Bools, Floats, States, key_of, states_of

EXACT_UP_TO = 40
"""Number of blocks up to which the exact solver is faster than tabu search."""

FEW = 20_000
"""Most states of a target to list one by one."""


def lowest(hamiltonian: Hamiltonian, target: Target, k: int, seed: int) -> States:
    """Return the ``k`` lowest states of a Hamiltonian among the target's: (<= k, N)."""
    problem = target.problem(hamiltonian)
    if hamiltonian.n <= EXACT_UP_TO:
        return solve(problem, "exact", k, threads=1).states
    return solve(problem, "tabu", k, seed=seed).states


def every(target: Target, n: int) -> States | None:
    """Return all states of a target, or None if there are more than `FEW`."""
    if target.low != target.high or math.comb(n, target.low) > FEW:
        return None
    states = states_of(n, itertools.combinations(range(n), target.low))
    return states[target.feasible(states)]


def windows(hamiltonian: Hamiltonian, target: Target, count: int) -> States:
    """Return the ``count`` runs of consecutive blocks with the lowest energy."""
    n, size = hamiltonian.n, target.low
    states = states_of(n, (range(start, start + size) for start in range(n - size + 1)))
    states = states[target.feasible(states)]
    return states[np.argsort(hamiltonian.energies(states), kind="stable")[:count]]


def angular_window(angles: Floats, target: Target) -> States:
    """Return the target's run of consecutive blocks that rotates the stream least: (<= 1, N).

    Args:
        angles: (N + 1, N + 1) between the streams at the boundaries of blocks.
    """
    n = len(angles) - 1
    spans = [
        (i, i + m) for m in range(max(1, target.low), target.high + 1) for i in range(n + 1 - m)
    ]
    states = states_of(n, (range(*span) for span in spans))
    turns = np.array([angles[span] for span in spans])
    fits = np.flatnonzero(target.feasible(states))
    return states[fits[np.argsort(turns[fits], kind="stable")[:1]]]


def thompson(
    surrogate: Surrogate, target: Target, count: int, rng: np.random.Generator, heat: float
) -> States:
    """Return ground states of ``count`` Hamiltonians drawn from the posterior."""
    seeds = rng.integers(2**31, size=count)
    return np.concatenate(
        [lowest(surrogate.sample(rng, heat), target, 1, int(seed)) for seed in seeds]
    )


def exchanges(state: Bools, target: Target) -> States:
    """Return every feasible state one exchange, one removal or one re-insertion away."""
    single = np.eye(len(state), dtype=bool)
    gone, here = np.flatnonzero(state), np.flatnonzero(~state)
    pairs = (single[gone][:, None] | single[here][None]).reshape(-1, len(state))
    found = np.concatenate([state ^ pairs, flips(state)])
    return found[target.feasible(found)]


def flips(state: Bools) -> States:
    """Return all states (N, N) that differ in one block."""
    return np.asarray(state[None] ^ np.eye(len(state), dtype=bool))


def by_slope(state: Bools, surrogate: Surrogate, slopes: Floats, target: Target) -> States:
    """Return exchanges around a state, the most promising first.

    The surrogate prices the removed block, and the gate's slope the restored block.

    Args:
        slopes: (N,) slopes of the loss in the gates at ``state``.
    """
    moves = exchanges(state, target)
    removal = surrogate.mean.energies(state | moves)
    gain = ((state & ~moves) * slopes).sum(1)
    return moves[np.argsort(removal + gain, kind="stable")]


def by_bound(surrogate: Surrogate, states: States) -> States:
    """Sort states by their posterior mean minus one standard deviation, the lowest first."""
    bound = surrogate.mean.energies(states) - surrogate.deviation(states)
    return states[np.argsort(bound, kind="stable")]


def grown(states: Iterable[Bools], target: Target) -> States:
    """Return all states with one more removed block that exceed no row of the target."""
    found = [flips(state)[~state] for state in states]
    if not found:
        return np.zeros((0, 0), dtype=bool)
    children = np.unique(np.concatenate(found), axis=0)
    return children[target.extendable(children)]


def unseen(states: States, seen: Callable[[Bools], bool], count: int) -> list[Bools]:
    """Return the first ``count`` distinct states that were not measured yet."""
    out: dict[str, Bools] = {}
    for state in states:
        if len(out) == count:
            break
        if not seen(state):
            out.setdefault(key_of(state), state)
    return list(out.values())
