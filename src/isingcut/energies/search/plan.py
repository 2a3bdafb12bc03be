"""How a search uses its budget, and the budget it takes where none is given.

The numbers were chosen on SmolLM2-135M (docs/experiments.md).
"""

from __future__ import annotations

import numpy as np

from isingcut.energies.search.proposals import flips
from isingcut.measure.losses import tree_nodes

FIRST_SHARE, FIRST_TOKENS = 0.125, 512
"""What a state is first measured on, the smaller of a share of the samples and as many as hold so
many tokens: sorting takes few, however large the text is."""
GROWTH = 3.0
"""Factor on the samples from one rung to the next; the last is all of them."""
PRIOR_SHARE = 0.4
"""Most of the budget that the pair energy may take."""
ONE_PASS_SHARE = 0.05
"""Most of the budget for one pass of the original, which is cut short for less."""
BEAM, CHILDREN = 3, 8
"""States kept, and states measured, per size on the way up."""
DRAWS, MINIMA, MOVES, SLOPES = 6, 4, 6, 2
"""States proposed in a round: ground states of sampled Hamiltonians, lowest states of the mean,
moves around the best states by the surrogate's bound, and around the best one by the slopes of its
gates."""
PROMOTED = 3
"""States taken to the next rung in a round."""
FINALISTS = 4
"""States measured on all samples in the end, or on as many as are paid for."""
RESERVED = 1 / 3
"""Most of the budget that is kept for them."""
PATIENCE = 8
"""Rounds without a new best state after which a target is left alone."""


def rungs(samples: int, tokens: int) -> list[int]:
    """Numbers of samples that a state is measured on, step by step, ascending.

    Args:
        samples: of the text.
        tokens: it holds.
    """
    share = min(FIRST_SHARE, FIRST_TOKENS / tokens)
    steps = {samples}
    # A last step to little more than what was seen already would be a waste.
    while share * GROWTH**0.5 < 1:
        steps.add(max(1, round(share * samples)))
        share *= GROWTH
    return sorted(steps)


def one_pass_samples(budget: float, samples: int) -> int:
    """Samples of a text that the original is run on once: all, where the budget is large enough."""
    return max(1, min(samples, int(ONE_PASS_SHARE * budget * samples)))


def greedy_price(n: int, remove: int) -> float:
    """Passes that a greedy path of ``remove`` of ``n`` blocks takes, prefixes shared."""
    state = np.zeros(n, dtype=bool)
    total = 0
    for step in range(remove):
        total += tree_nodes(flips(state)[~state])
        # The price depends a little on which blocks go; evenly spread ones stand for them.
        state[np.flatnonzero(~state)[(step * 7) % int((~state).sum())]] = True
    return total / n
