"""`block-influence`: remove the blocks that rotate hidden states least (ShortGPT).

    BI_i = 1 - E_t [cos(x_i,t , x_i+1,t)]

with x_i the hidden state before block i and the mean over all tokens. The published method
scores the intact model once and removes the M lowest; `iterative` removes one block at a time
and scores the cut model again.

Source: Men et al., arXiv 2403.03853, section 3. The text differs: this code scores on the given
tokens, ShortGPT on PG19.
"""

from __future__ import annotations

from dataclasses import dataclass

from isingcut.baselines.base import Outcome, check_count
from isingcut.data.tokens import TokenSet
from isingcut.ising.states import states_of
from isingcut.measure.losses import tree_nodes
from isingcut.measure.streams import block_means, influence, pick_blocks
from isingcut.measure.work import Work
from isingcut.models.replay import Replay

__all__ = ["BlockInfluence"]


@dataclass(frozen=True)
class BlockInfluence:
    """ShortGPT's block influence.

    Attributes:
        iterative: score again after each removal.
    """

    iterative: bool = False

    def choose(
        self, replay: Replay, tokens: TokenSet, remove: int, work: Work, seed: int
    ) -> Outcome:
        """Choose the blocks of lowest influence; ``seed`` has no effect."""
        check_count(replay, remove)
        n = len(replay)
        scores = block_means(replay, tokens, work, influence)
        if not self.iterative:
            info = {"influence": scores.tolist()}
            return Outcome(
                pick_blocks(scores, remove), passes=1.0, heads=0.0, info=info
            )
        order = [pick_blocks(scores, 1)[0]]
        runs = n
        while len(order) < remove:
            # Before the first removed block, the scores equal the original's.
            runs += tree_nodes(states_of(n, [order]))
            again = block_means(replay, tokens, work, influence, removed=order)
            order.append(pick_blocks(again, 1)[0])
        info = {"influence": scores.tolist(), "order": order}
        return Outcome(tuple(sorted(order)), passes=runs / n, heads=0.0, info=info)
