"""How a search uses its budget, and the budget it takes where none is given."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from isingcut.energies.search import proposals
from isingcut.measure.pieces import tree_nodes


@dataclass(frozen=True)
class Plan:
    """How the budget is used; the defaults were chosen on SmolLM2-135M.

    Attributes:
        first_share, first_tokens: what a state is first measured on, the smaller of a share of
            the samples and as many as hold so many tokens: sorting takes few, however large the
            text is (docs/experiments.md).
        growth: factor on the samples from one rung to the next; the last is all of them.
        prior_share: most of the budget that the pair energy may take.
        beam: states kept per size on the way up.
        children: states measured per size on the way up.
        draws, minima, moves, slopes: states proposed in a round: ground states of sampled
            Hamiltonians, lowest states of the mean, moves around the best states by the
            surrogate's bound, and moves around the best one by the slopes of its gates.
        promoted: states taken to the next rung in a round.
        finalists: states measured on all samples in the end, or on as many as are paid for.
        reserved: most of the budget that is kept for them.
        patience: rounds without a new best state after which a target is left alone.
    """

    first_share: float = 0.125
    first_tokens: int = 512
    growth: float = 3.0
    prior_share: float = 0.4
    beam: int = 3
    children: int = 8
    draws: int = 6
    minima: int = 4
    moves: int = 6
    slopes: int = 2
    promoted: int = 3
    finalists: int = 4
    reserved: float = 1 / 3
    patience: int = 8

    def rungs(self, samples: int, tokens: int) -> list[int]:
        """Numbers of samples that a state is measured on, step by step, ascending.

        Args:
            samples: of the text.
            tokens: it holds.
        """
        share = min(self.first_share, self.first_tokens / tokens)
        steps = {samples}
        # A last step to little more than what was seen already would be a waste.
        while share * self.growth**0.5 < 1:
            steps.add(max(1, round(share * samples)))
            share *= self.growth
        return sorted(steps)


def greedy_price(n: int, remove: int) -> float:
    """Passes that a greedy path of ``remove`` of ``n`` blocks takes, prefixes shared."""
    state = np.zeros(n, dtype=bool)
    total = 0
    for step in range(remove):
        total += tree_nodes(proposals.flips(state)[~state])
        # The price depends a little on which blocks go; evenly spread ones stand for them.
        state[np.flatnonzero(~state)[(step * 7) % int((~state).sum())]] = True
    return total / n
