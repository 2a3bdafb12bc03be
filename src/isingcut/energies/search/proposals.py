"""The targets of a search, and proposals of states to measure: first from one-pass methods, a pair
energy and a beam over sizes; then minima of a surrogate, and moves around the best states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations

import numpy as np

from isingcut.energies.pairwise import list_removals
from isingcut.energies.search.evaluator import Estimates, Evaluator
from isingcut.energies.search.surrogate import Surrogate
from isingcut.ising.constraints import LinearConstraint, count
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.problem import Problem
from isingcut.ising.solvers import solve
from isingcut.ising.states import Bools, Floats, States, key_of, states_of


class Target:
    """One removal to search for.

    Args:
        label: removal as typed, for example ``"8"`` or ``"params=25%"``.
        rows: constraints of the removal over N blocks, one or more.

    Attributes:
        low, high: fewest and most removed blocks of a feasible state.
        size: number of removed blocks that is enough if all blocks have the average cost. A budget
            allows states with many more removed blocks; the good ones are near this size.

    Raises:
        InfeasibleError: no state satisfies the rows.
    """

    def __init__(self, label: str, rows: Sequence[LinearConstraint]) -> None:
        n = len(rows[0].coefficients)
        self._problem = Problem(Hamiltonian(np.zeros(n), np.zeros((n, n))), rows)
        self.label = label
        self.rows = self._problem.constraints
        self.low, self.high = self._problem.cardinality
        enough = [
            math.ceil((row.rhs - row.tolerance) / row.coefficients.mean())
            for row in rows
            if row.sense == ">="
            and row.coefficients.min() >= 0
            and row.coefficients.any()
        ]
        self.size = min(self.high, max([self.low, *enough]))

    def __repr__(self) -> str:
        return f"Target({self.label}: {'; '.join(row.describe() for row in self.rows)})"

    @classmethod
    def count(cls, n: int, remove: int) -> Target:
        """Make the target to remove exactly ``remove`` of ``n`` blocks."""
        return cls(str(remove), [count(n, remove)])

    def feasible(self, states: States) -> Bools:
        """Return (S,) bool: whether each state of (S, N) satisfies every row."""
        return self._problem.feasible(states)

    def extendable(self, states: States) -> Bools:
        """Return (S,) bool: whether a state exceeds no upper limit, so that it may be extended."""
        result = np.ones(len(states), dtype=bool)
        for row in self.rows:
            if row.sense != ">=" and (row.coefficients >= 0).all():
                result &= states @ row.coefficients <= row.rhs + row.tolerance
        return result

    def near(self, states: States) -> Bools:
        """Return (S,) bool: whether sizes are at most 1 outside `low` to `size` + 2."""
        size = states.sum(1)
        most = min(self.high, self.size + 2)
        return np.asarray((size >= self.low - 1) & (size <= most + 1))


BEAM = 3
CHILDREN = 8
"""Numbers of states that the beam keeps and measures per size."""

EXACT_UP_TO = 40
"""Number of blocks up to which the exact solver is faster than tabu search."""

FEW = 20_000
"""Largest number of states of a target to list one by one."""


def find_lowest(hamiltonian: Hamiltonian, target: Target, k: int, seed: int) -> States:
    """Return the ``k`` lowest states of a Hamiltonian among the target's: (<= k, N)."""
    problem = Problem(hamiltonian, target.rows)
    if hamiltonian.n <= EXACT_UP_TO:
        return solve(problem, "exact", k, threads=1).states
    return solve(problem, "tabu", k, seed=seed).states


def list_states(target: Target, n: int) -> States | None:
    """Return all states of a target, or None if they differ in size or are more than `FEW`."""
    if target.low != target.high or math.comb(n, target.low) > FEW:
        return None
    states = states_of(n, combinations(range(n), target.low))
    return states[target.feasible(states)]


def list_windows(n: int, target: Target, most: int) -> States:
    """List the target's runs of at most ``most`` of ``n`` consecutive blocks, shortest first."""
    spans = (
        range(first, first + size)
        for size in range(max(1, target.low), most + 1)
        for first in range(n + 1 - size)
    )
    states = states_of(n, spans)
    return states[target.feasible(states)]


def find_windows(hamiltonian: Hamiltonian, target: Target, count: int) -> States:
    """Return the ``count`` feasible runs of consecutive blocks with the lowest energy."""
    states = list_windows(hamiltonian.n, target, target.low)
    return states[np.argsort(hamiltonian.energies(states), kind="stable")[:count]]


def angular_window(angles: Floats, target: Target) -> States:
    """Return the target's run of consecutive blocks that rotates hidden states least: (<= 1, N).

    Args:
        angles: (N + 1, N + 1) angles between the hidden states at any two block boundaries.
    """
    states = list_windows(len(angles) - 1, target, target.high)
    first = states.argmax(1)
    turns = angles[first, first + states.sum(1)]
    return states[np.argsort(turns, kind="stable")[:1]]


def draw_minima(
    surrogate: Surrogate,
    target: Target,
    count: int,
    rng: np.random.Generator,
    best: Bools,
) -> tuple[States, Floats]:
    """Return ground states of ``count`` Hamiltonians drawn from the posterior, and their gains.

    Returns:
        states (count, N), and gains (count,): energy of ``best`` minus that of the drawn state.
    """
    states = []
    gains = []
    for seed in rng.integers(2**31, size=count):
        drawn = surrogate.sample(rng)
        states.append(find_lowest(drawn, target, 1, int(seed))[0])
        gains.append(drawn.energy(best) - drawn.energy(states[-1]))
    return np.array(states), np.array(gains)


LOW = 10
REFITS = 8
"""Number of lowest states of the mean to compare with their bound, and most repetitions of this."""
BOUND_SPREAD = 0.02
"""Standard deviation of a bound that is used as a measurement, relative to the bound."""


def fit_bounded(
    prior: Hamiltonian, known: Estimates, targets: Sequence[Target]
) -> Surrogate:
    """Fit a posterior in which low states cost at least as much as measured subsets of them.

    Removing a further block hardly ever lowers the KL (docs/experiments/search.md), but a quadratic
    form can be negative at unmeasured states. So each unmeasured low state of the mean is compared
    with its bound, see `bound_below`. If its energy is lower, the state is added as a measurement
    with this bound as its loss, and the posterior is fitted again.
    """
    states = known.states
    losses = known.loss
    noise = known.sd
    measured = {key_of(state) for state in states}
    for _ in range(REFITS):
        fitted = Surrogate(prior, states, losses, noise)
        low = np.concatenate([find_lowest(fitted.mean, t, LOW, 0) for t in targets])
        bound = bound_below(low, known)
        below = fitted.mean.energies(low) < bound
        below &= [key_of(state) not in measured for state in low]
        if not below.any():
            return fitted
        measured |= {key_of(state) for state in low[below]}
        states = np.concatenate([states, low[below]])
        losses = np.concatenate([losses, bound[below]])
        noise = np.concatenate([noise, BOUND_SPREAD * bound[below]])
    return Surrogate(prior, states, losses, noise)


def bound_below(states: States, known: Estimates) -> Floats:
    """Return (S,) the largest loss of any measured subset of each state's removed blocks, or 0."""
    outside = known.states.astype(float) @ (~states).T.astype(float)
    return np.asarray(np.where(outside.T == 0, known.loss, 0.0).max(1))


def list_exchanges(state: Bools, target: Target) -> States:
    """Return every feasible state that is one exchange, one removal or one restored block away."""
    single = np.eye(len(state), dtype=bool)
    gone = np.flatnonzero(state)
    here = np.flatnonzero(~state)
    pairs = (single[gone][:, None] | single[here][None]).reshape(-1, len(state))
    near = np.concatenate([state ^ pairs, flip_each(state)])
    return near[target.feasible(near)]


def flip_each(state: Bools) -> States:
    """Return all states (N, N) that differ in one block."""
    return np.asarray(state[None] ^ np.eye(len(state), dtype=bool))


def by_slope(
    state: Bools, surrogate: Surrogate, slopes: Floats, target: Target
) -> States:
    """Return exchanges around a state, the most promising first.

    The surrogate predicts the effect of a removed block, the gate slope that of a restored block.

    Args:
        slopes: (N,) derivatives of the loss with respect to the gates at ``state``.
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
    """Return all states with one more removed block that exceed no upper limit of the target."""
    children = np.concatenate([flip_each(state)[~state] for state in states])
    children = np.unique(children, axis=0)
    return children[target.extendable(children)]


def pair_energy(
    evaluator: Evaluator, passes: float, most_samples: int, influence: Floats
) -> Hamiltonian:
    """Measure the pair energy, the prior of the search, from as many pairs as the budget allows.

    Single removals come first. Pairs follow in ascending order of the sum of their own terms, as
    many as ``passes`` allow; the coupling of an unmeasured pair (two costly blocks) is 0. If all
    fit, they are measured on up to ``most_samples`` samples. If not even the single removals fit,
    the own terms are ``influence`` (N,).
    """
    n = evaluator.blocks
    every = list_removals(n)
    pairs = list(combinations(range(n), 2))
    singles = every[:n]
    affordable = [
        r for r in range(1, most_samples + 1) if evaluator.price(every, r) <= passes
    ]
    samples = max(affordable, default=1)
    if evaluator.price(singles, samples) > passes:
        return Hamiltonian(influence, np.zeros((n, n)), unit="arbitrary")
    tokens = evaluator.ledger.counts[:samples].sum()

    def losses(states: States) -> Floats:
        known = [evaluator.known[key_of(s)] for s in states]
        return np.array([k.sums[:samples].sum() / tokens for k in known])

    evaluator.measure(singles, samples, f"{n} single removals")
    h = losses(singles)
    J = np.zeros((n, n))
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


def one_pass_states(
    evaluator: Evaluator, target: Target, samples: int
) -> dict[str, Bools]:
    """Return the states chosen by methods that need one pass of the original, by method name.

    The angular window is missing if no run of blocks satisfies the target.
    """
    influence, angles = evaluator.one_pass(samples)
    fields = Hamiltonian(influence, np.zeros((evaluator.blocks, evaluator.blocks)))
    chosen = {
        "angular-window": angular_window(angles, target),
        "block-influence": find_lowest(fields, target, 1, 0),
    }
    return {method: states[0] for method, states in chosen.items() if len(states)}


def beam_over_sizes(
    evaluator: Evaluator,
    energy: Hamiltonian,
    target: Target,
    *,
    samples: int,
    afford: Callable[[States], bool],
) -> None:
    """Measure good states of every size up to a target's, on ``samples`` samples.

    The few best states of each size are kept. Of all states with one more removed block, the few
    with the lowest predicted loss are measured. A path ends at a state that satisfies the target,
    so that no more blocks are removed than a budget needs.
    """
    beam = [np.zeros(evaluator.blocks, dtype=bool)]
    for size in range(1, target.high + 1):
        unfinished = [s for s in beam if not target.feasible(s[None])[0]]
        if not unfinished or not len(children := grow(unfinished, target)):
            return
        predicted = _predict(evaluator, energy, children, unfinished)
        picked = children[np.argsort(predicted, kind="stable")[:CHILDREN]]
        if not afford(picked):
            return
        evaluator.measure(picked, samples, f"first states, {size} removed")
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
        best = np.where(
            own, np.minimum(best, measured + energies - energy.energy(parent)), best
        )
    return best
