"""The beginning of a search: one-pass methods, a pair energy, and a beam over sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np

from isingcut.energies.pairwise import removals
from isingcut.energies.search import plan, proposals
from isingcut.energies.search.evaluator import Evaluator
from isingcut.energies.search.targets import Target
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.states import Bools, Floats, States, key_of, states_of


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
    every, pairs = removals(n), list(combinations(range(n), 2))
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
        "angular-window": proposals.angular_window(angles, target),
        "block-influence": proposals.lowest(fields, target, 1, 0),
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
        grown = proposals.grown(unfinished, target)
        if not len(grown):
            return
        predicted = _predicted(evaluator, energy, grown, unfinished)
        picked = grown[np.argsort(predicted, kind="stable")[: plan.CHILDREN]]
        if not afford(picked):
            return
        evaluator.measure(picked, samples, f"first states of {size} blocks")
        losses = [np.nansum(evaluator.known[key_of(s)].sums[:samples]) for s in picked]
        beam = [picked[i] for i in np.argsort(losses, kind="stable")[: plan.BEAM]]


def _predicted(
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
