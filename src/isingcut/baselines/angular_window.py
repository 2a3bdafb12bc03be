"""`angular-window`: remove the M consecutive blocks that together rotate hidden states least.

    d(l) = E [ arccos(cos(x_l, x_l+M)) ] / pi

with x_l the hidden state before block l, and x_N the one after the last block; the window starts
at the l of lowest d. The mean is over the last token of each sample.

Source: Gromov et al., arXiv 2403.17887, section 3.2 (without its healing).
"""

from dataclasses import dataclass

import numpy as np

from isingcut.baselines.base import Outcome
from isingcut.data.tokens import TokenSet
from isingcut.measure.streams import one_pass
from isingcut.measure.work import Work
from isingcut.models.replay import Replay

__all__ = ["AngularWindow"]


@dataclass(frozen=True)
class AngularWindow:
    """The contiguous window of least angular distance."""

    def choose(
        self, replay: Replay, tokens: TokenSet, remove: int, work: Work, seed: int
    ) -> Outcome:
        """Choose the window; ``seed`` has no effect."""
        _, angles = one_pass(replay, tokens, work)
        distances = np.diagonal(angles, remove)
        start = int(np.argmin(distances))
        window = tuple(range(start, start + remove))
        return Outcome(window, passes=1.0, info={"distance": distances.tolist()})
