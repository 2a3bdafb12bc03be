"""`sleb`: greedy removal, one block per step.

Each step skips each remaining block of the model cut so far, one at a time, measures the loss, and
removes the block whose removal gives the lowest loss.

Source: Song et al., arXiv 2402.09025, algorithm 1 with the third of its metrics (the loss of
the already cut model). As published, the loss is the NLL and the first and the last block stay;
`loss="kl"` and `keep_ends=False` are additions. Here the candidates of a step share their
prefixes, which changes the cost but not the choice.
"""

from dataclasses import dataclass

import numpy as np

from isingcut.baselines.base import Outcome, open_ledger
from isingcut.data.tokens import TokenSet
from isingcut.errors import InputError
from isingcut.measure.work import Work
from isingcut.models.replay import Replay

__all__ = ["Sleb"]


@dataclass(frozen=True)
class Sleb:
    """SLEB's greedy search.

    Attributes:
        loss: ``"nll"`` or ``"kl"``.
        keep_ends: never remove the first and the last block.
    """

    loss: str = "nll"
    keep_ends: bool = True

    def choose(
        self, replay: Replay, tokens: TokenSet, remove: int, work: Work, seed: int
    ) -> Outcome:
        """Choose the blocks of the greedy path; ``seed`` has no effect.

        Complexity: about M (N - M / 2) states, which share their prefixes within a step.
        """
        n = len(replay)
        most = n - 1 - self.keep_ends
        if not 1 <= remove <= most:
            raise InputError(
                f"cannot remove {remove} of {n} blocks; expected 1 to {most} with this method"
            )
        ledger = open_ledger(replay, tokens, work, self.loss)
        free = range(self.keep_ends, n - self.keep_ends)
        state = np.zeros(n, dtype=bool)
        order: list[int] = []
        path: list[float] = []
        for step in range(remove):
            candidates = [i for i in free if not state[i]]
            states = state | np.eye(n, dtype=bool)[candidates]
            losses = ledger.losses(
                states, description=f"removal {step + 1} of {remove}"
            )
            best = candidates[int(np.argmin(losses))]
            state[best] = True
            order.append(best)
            path.append(float(losses.min()))
        info = {"order": order, "losses": path}
        return Outcome(tuple(sorted(order)), ledger.passes, ledger.heads, info)
