"""Constants of a search: how it uses its budget, and the default budget.

The numbers were chosen on SmolLM2-135M (docs/experiments.md).
"""

from __future__ import annotations

import numpy as np

from isingcut.energies.search.proposals import flips
from isingcut.measure.tree import tree_nodes

FIRST_SHARE, FIRST_TOKENS = 0.125, 512
"""The first rung of a state: the smaller of a share of the samples and this number of tokens,
because sorting takes little text."""
GROWTH = 3.0
"""Factor between the samples of two rungs; the last rung is all samples."""
PRIOR_SHARE = 0.4
"""Largest share of the budget for the pair energy."""
ONE_PASS_SHARE = 0.05
"""Largest share of the budget for one pass of the original, which otherwise reads less text."""
BEAM, CHILDREN = 3, 8
"""States kept, and states measured, per size of the beam."""
DRAWS, MINIMA, MOVES, SLOPES = 6, 4, 6, 2
"""States proposed per round: ground states of sampled Hamiltonians, lowest states of the mean,
moves around the best states by the surrogate's bound, and around the best state by its gate
slopes."""
PROMOTED = 3
"""States promoted to the next rung per round."""
FINALISTS = 4
"""States measured on all samples at the end, or on as many as the budget allows."""
RESERVED = 1 / 3
"""Largest share of the budget reserved for them."""
PATIENCE = 8
"""Rounds without a new best state after which the search of a target ends."""


def rungs(samples: int, tokens: int) -> list[int]:
    """Return the numbers of samples that a state is measured on, ascending.

    Args:
        samples: samples of the text.
        tokens: tokens of the text.
    """
    share = min(FIRST_SHARE, FIRST_TOKENS / tokens)
    steps = {samples}
    # A last step to only a few more samples would be a waste.
    while share * GROWTH**0.5 < 1:
        steps.add(max(1, round(share * samples)))
        share *= GROWTH
    return sorted(steps)


def one_pass_samples(budget: float, samples: int) -> int:
    """Return the number of samples for the pass of the original: all, if the budget allows."""
    return max(1, min(samples, int(ONE_PASS_SHARE * budget * samples)))


def greedy_price(n: int, remove: int) -> float:
    """Return the passes of a greedy path to ``remove`` of ``n`` blocks, with shared prefixes."""
    state = np.zeros(n, dtype=bool)
    total = 0
    for step in range(remove):
        total += tree_nodes(flips(state)[~state])
        # The cost depends slightly on the removed blocks; assume evenly spread ones.
        state[np.flatnonzero(~state)[(step * 7) % int((~state).sum())]] = True
    return total / n
