"""`block-influence`: remove the blocks that rotate hidden states least (ShortGPT).

    BI_i = 1 - E_t [cos(x_i,t , x_i+1,t)]

with x_i the hidden state before block i and the mean over all tokens. The M blocks of lowest
influence are removed.

Source: Men et al., arXiv 2403.03853, section 3. The text differs: this code scores on the given
tokens, ShortGPT on PG19.
"""

from dataclasses import dataclass

from isingcut.baselines.base import Outcome
from isingcut.data.tokens import TokenSet
from isingcut.measure.streams import one_pass, pick_blocks
from isingcut.measure.work import Work
from isingcut.models.replay import Replay

__all__ = ["BlockInfluence"]


@dataclass(frozen=True)
class BlockInfluence:
    """ShortGPT's block influence."""

    def choose(
        self, replay: Replay, tokens: TokenSet, remove: int, work: Work, seed: int
    ) -> Outcome:
        """Choose the blocks of lowest influence; ``seed`` has no effect."""
        scores = one_pass(replay, tokens, work)[0]
        return Outcome(
            pick_blocks(scores, remove), passes=1.0, info={"influence": scores.tolist()}
        )
