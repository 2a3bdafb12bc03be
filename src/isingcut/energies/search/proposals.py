"""The targets of a search, and proposals of new states: exact minima of a surrogate, and moves
around the best states; at the beginning one-pass methods, a pair energy, and a beam over sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from isingcut.energies.pairwise import list_removals
from isingcut.energies.search.evaluator import Estimates, Evaluator
from isingcut.energies.search.surrogate import Surrogate
from isingcut.errors import InputError
from isingcut.ising.constraints import LinearConstraint, count
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.problem import Problem
from isingcut.ising.solvers import solve
from isingcut.ising.states import Bools, Floats, States, key_of, states_of


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


BEAM, CHILDREN = 3, 8
"""States kept, and states measured, per size of the beam."""

EXACT_UP_TO = 40
"""Number of blocks up to which the exact solver is faster than tabu search."""

FEW = 20_000
"""Most states of a target to list one by one."""


def find_lowest(hamiltonian: Hamiltonian, target: Target, k: int, seed: int) -> States:
    """Return the ``k`` lowest states of a Hamiltonian among the target's: (<= k, N)."""
    problem = target.problem(hamiltonian)
    if hamiltonian.n <= EXACT_UP_TO:
        return solve(problem, "exact", k, threads=1).states
    return solve(problem, "tabu", k, seed=seed).states


def list_states(target: Target, n: int) -> States | None:
    """Return all states of a target, or None if there are more than `FEW`."""
    if target.low != target.high or math.comb(n, target.low) > FEW:
        return None
    states = states_of(n, combinations(range(n), target.low))
    return states[target.feasible(states)]


def find_windows(hamiltonian: Hamiltonian, target: Target, count: int) -> States:
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


def draw_minima(
    surrogate: Surrogate, target: Target, count: int, rng: np.random.Generator, best: Bools
) -> tuple[States, Floats]:
    """Return ground states of ``count`` Hamiltonians drawn from the posterior, and their gains.

    Returns:
        the states (count, N), and how much lower than ``best`` each is in its Hamiltonian (count,).
    """
    states, gains = [], []
    for seed in rng.integers(2**31, size=count):
        drawn = surrogate.sample(rng)
        states.append(find_lowest(drawn, target, 1, int(seed))[0])
        gains.append(drawn.energy(best) - drawn.energy(states[-1]))
    return np.array(states), np.array(gains)


LOW, REFITS = 10, 8
"""States of the mean that are compared with their bound, and how often that is repeated."""
BOUND_SPREAD = 0.02
"""Standard deviation of a bound as a measurement, as a share of it."""


def fit_bounded(prior: Hamiltonian, found: Estimates, targets: Sequence[Target]) -> Surrogate:
    """Fit a posterior whose low states cost at least what was measured of their removals.

    Adding a removal hardly ever lowers a KL (docs/experiments/search.md), and a quadratic form can
    fall below zero where nothing was measured. So an unmeasured low state of the mean that is below
    the largest loss of a measured state that it contains is added as if it had that loss, and the
    posterior is fitted again.
    """
    states, losses, noise = found.states, found.loss, found.sd
    measured = {key_of(state) for state in states}
    for _ in range(REFITS):
        fitted = Surrogate(prior, states, losses, noise)
        low = np.concatenate([find_lowest(fitted.mean, t, LOW, 0) for t in targets])
        bound = bound_below(low, found)
        below = fitted.mean.energies(low) < bound
        below &= [key_of(state) not in measured for state in low]
        if not below.any():
            return fitted
        measured |= {key_of(state) for state in low[below]}
        states = np.concatenate([states, low[below]])
        losses = np.concatenate([losses, bound[below]])
        noise = np.concatenate([noise, BOUND_SPREAD * bound[below]])
    return Surrogate(prior, states, losses, noise)


def bound_below(states: States, found: Estimates) -> Floats:
    """Return (S,) the largest loss of a measured state that each state (S, N) contains, or 0."""
    outside = found.states.astype(float) @ (~states).T.astype(float)
    return np.asarray(np.where(outside.T == 0, found.loss, 0.0).max(1))


def list_exchanges(state: Bools, target: Target) -> States:
    """Return every feasible state one exchange, one removal or one re-insertion away."""
    single = np.eye(len(state), dtype=bool)
    gone, here = np.flatnonzero(state), np.flatnonzero(~state)
    pairs = (single[gone][:, None] | single[here][None]).reshape(-1, len(state))
    found = np.concatenate([state ^ pairs, flip_each(state)])
    return found[target.feasible(found)]


def flip_each(state: Bools) -> States:
    """Return all states (N, N) that differ in one block."""
    return np.asarray(state[None] ^ np.eye(len(state), dtype=bool))


def by_slope(state: Bools, surrogate: Surrogate, slopes: Floats, target: Target) -> States:
    """Return exchanges around a state, the most promising first.

    The surrogate prices the removed block, and the gate's slope the restored block.

    Args:
        slopes: (N,) slopes of the loss in the gates at ``state``.
    """
    moves = list_exchanges(state, target)
    removal = surrogate.mean.energies(state | moves)
    gain = ((state & ~moves) * slopes).sum(1)
    return moves[np.argsort(removal + gain, kind="stable")]


def by_bound(surrogate: Surrogate, states: States) -> States:
    """Sort states by their posterior mean minus one standard deviation, the lowest first."""
    bound = surrogate.mean.energies(states) - surrogate.deviation(states)
    return states[np.argsort(bound, kind="stable")]


def grow(states: Iterable[Bools], target: Target) -> States:
    """Return all states with one more removed block that exceed no row of the target."""
    found = [flip_each(state)[~state] for state in states]
    if not found:
        return np.zeros((0, 0), dtype=bool)
    children = np.unique(np.concatenate(found), axis=0)
    return children[target.extendable(children)]


def select_unseen(states: States, seen: Callable[[Bools], bool], count: int) -> list[Bools]:
    """Return the first ``count`` distinct states that were not measured yet."""
    out: dict[str, Bools] = {}
    for state in states:
        if len(out) == count:
            break
        if not seen(state):
            out.setdefault(key_of(state), state)
    return list(out.values())


def pair_energy(
    evaluator: Evaluator, passes: float, most_samples: int, influence: Floats
) -> Hamiltonian:
    """Measure the pair energy, the prior of the search, from as many pairs as the budget allows.

    Singles come first. Pairs follow by rising sum of their own terms, as many as ``passes`` allow;
    the coupling of an unmeasured pair, of two costly blocks, is 0. If all fit, they are measured
    on up to ``most_samples`` samples. If not even the singles fit, ``influence`` (N,) replaces
    them.
    """
    n = evaluator.blocks
    every, pairs = list_removals(n), list(combinations(range(n), 2))
    singles = every[:n]
    affordable = [r for r in range(1, most_samples + 1) if evaluator.price(every, r) <= passes]
    samples = max(affordable, default=1)
    if evaluator.price(singles, samples) > passes:
        return Hamiltonian(influence, np.zeros((n, n)), unit="arbitrary")
    tokens = evaluator.ledger.counts[:samples].sum()

    def losses(states: States) -> Floats:
        known = [evaluator.known[key_of(s)] for s in states]
        return np.array([k.sums[:samples].sum() / tokens for k in known])

    evaluator.measure(singles, samples, f"{n} single removals")
    h, J = losses(singles), np.zeros((n, n))
    pairs.sort(key=lambda p: h[p[0]] + h[p[1]])
    count = len(pairs)
    while count and evaluator.price(states_of(n, pairs[:count]), samples) > passes:
        count = int(count * 0.9)
    if count:
        states = states_of(n, pairs[:count])
        evaluator.measure(states, samples, f"{count} pair removals")
        for (i, j), loss in zip(pairs, losses(states), strict=False):
            J[i, j] = J[j, i] = loss - h[i] - h[j]
    return Hamiltonian(h, J, unit="nats/token")


def one_pass_states(evaluator: Evaluator, target: Target, samples: int) -> dict[str, Bools]:
    """Return the choices of methods that need one pass of the original, by method name.

    The angular window is missing if no run of blocks satisfies the target.
    """
    influence, angles = evaluator.one_pass(samples)
    fields = Hamiltonian(influence, np.zeros((evaluator.blocks, evaluator.blocks)))
    found = {
        "angular-window": angular_window(angles, target),
        "block-influence": find_lowest(fields, target, 1, 0),
    }
    return {method: states[0] for method, states in found.items() if len(states)}


def beam_over_sizes(
    evaluator: Evaluator,
    energy: Hamiltonian,
    target: Target,
    *,
    samples: int,
    afford: Callable[[States], bool],
) -> None:
    """Measure good states of every size up to a target's, on ``samples`` samples.

    Each size keeps its few best states. Of all states with one more removed block, the few with the
    lowest cost by the pair energy are measured. A path ends at a state that satisfies the target,
    so that a budget removes no more than needed.
    """
    beam = [np.zeros(evaluator.blocks, dtype=bool)]
    for size in range(1, target.high + 1):
        unfinished = [s for s in beam if not target.feasible(s[None])[0]]
        children = grow(unfinished, target)
        if not len(children):
            return
        predicted = _predict(evaluator, energy, children, unfinished)
        picked = children[np.argsort(predicted, kind="stable")[:CHILDREN]]
        if not afford(picked):
            return
        evaluator.measure(picked, samples, f"first states of {size} blocks")
        losses = [np.nansum(evaluator.known[key_of(s)].sums[:samples]) for s in picked]
        beam = [picked[i] for i in np.argsort(losses, kind="stable")[:BEAM]]


def _predict(
    evaluator: Evaluator, energy: Hamiltonian, children: States, beam: Sequence[Bools]
) -> Floats:
    """Predict losses: the best parent's measured loss plus the pair energy's cost of the block."""
    tokens = np.cumsum(evaluator.ledger.counts)
    best = np.full(len(children), np.inf)
    energies = energy.energies(children)
    for parent in beam:
        measured = 0.0
        if parent.any():
            known = evaluator.known[key_of(parent)]
            measured = float(np.nansum(known.sums) / tokens[known.n - 1])
        own = (children & parent).sum(1) == parent.sum()
        best = np.where(own, np.minimum(best, measured + energies - energy.energy(parent)), best)
    return best
