"""How a search begins: a pair energy for what the budget allows, and a beam over sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from isingcut.energies.search import proposals
from isingcut.energies.search.evaluator import Evaluator, Known
from isingcut.energies.search.targets import Target
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.states import Bools, Floats, States, states_of


@dataclass(frozen=True, eq=False)
class Begun:
    """What a search starts from.

    Attributes:
        energy: the pair energy, the prior of all that follows.
        influence: (N,) block influence on one sample.
        samples: samples the energy was measured on.
        pairs: pairs of blocks that were measured.
    """

    energy: Hamiltonian
    influence: Floats
    samples: int
    pairs: int


def begin(evaluator: Evaluator, passes: float, most_samples: int) -> Begun:
    """The pair energy, of all pairs or of those that a good state may contain.

    Singles come first. Pairs follow by rising sum of their own terms, as many as ``passes`` pay
    for; a pair that is left out has no coupling: both of its blocks are costly ones. If all
    fit, they are measured on up to ``most_samples`` samples. Where not even the singles fit,
    block influence stands for them.
    """
    n = evaluator.blocks
    influence = evaluator.influence(1)
    singles = states_of(n, [(i,) for i in range(n)])
    pairs = list(combinations(range(n), 2))
    every = np.concatenate([singles, states_of(n, pairs)])
    affordable = [r for r in range(1, most_samples + 1) if evaluator.price(every, r) <= passes]
    samples = max(affordable, default=1)
    if evaluator.price(singles, samples) > passes:
        energy = Hamiltonian(influence, np.zeros((n, n)), unit="arbitrary")
        return Begun(energy, influence, samples, 0)
    tokens = evaluator.counts[:samples].sum()

    def losses(states: States) -> Floats:
        return np.array([_known(evaluator, s).sums[:samples].sum() / tokens for s in states])

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
    return Begun(Hamiltonian(h, J, unit="nats/token"), influence, samples, count)


def beam_over_sizes(
    evaluator: Evaluator,
    energy: Hamiltonian,
    target: Target,
    *,
    samples: int,
    width: int,
    children: int,
    afford: Callable[[States], bool],
) -> None:
    """Measure good states of every size up to a target's, on ``samples`` samples.

    Each size keeps its ``width`` best states; of all states with one more block gone, the
    ``children`` that the pair energy's marginals like best are measured. A state that obeys the
    target is where a path ends: what a budget does not ask for stays.
    """
    beam = [np.zeros(evaluator.blocks, dtype=bool)]
    for size in range(1, target.high + 1):
        unfinished = [s for s in beam if not target.feasible(s[None])[0]]
        grown = proposals.grown(unfinished, target)
        if not len(grown):
            return
        predicted = _predicted(evaluator, energy, grown, unfinished)
        picked = grown[np.argsort(predicted, kind="stable")[:children]]
        if not afford(picked):
            return
        evaluator.measure(picked, samples, f"first states of {size} blocks")
        losses = [np.nansum(_known(evaluator, s).sums[:samples]) for s in picked]
        beam = [picked[i] for i in np.argsort(losses, kind="stable")[:width]]


def _predicted(
    evaluator: Evaluator, energy: Hamiltonian, children: States, beam: Sequence[Bools]
) -> Floats:
    """Measured loss of the best parent plus the pair energy's cost of one more block."""
    tokens = np.cumsum(evaluator.counts)
    best = np.full(len(children), np.inf)
    energies = energy.energies(children)
    for parent in beam:
        measured = 0.0
        if parent.any():
            known = _known(evaluator, parent)
            measured = float(np.nansum(known.sums) / tokens[known.n - 1])
        own = (children & parent).sum(1) == parent.sum()
        best = np.where(own, np.minimum(best, measured + energies - energy.energy(parent)), best)
    return best


def _known(evaluator: Evaluator, state: Bools) -> Known:
    found = evaluator.get(state)
    assert found is not None
    return found
