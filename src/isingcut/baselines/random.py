"""`random`: blocks drawn uniformly, the baseline that every method must beat."""

from dataclasses import dataclass

import numpy as np

from isingcut.baselines.base import Outcome
from isingcut.data.tokens import TokenSet
from isingcut.measure.work import Work
from isingcut.models.replay import Replay

__all__ = ["Random"]


@dataclass(frozen=True)
class Random:
    """A uniformly random state."""

    def choose(
        self, replay: Replay, tokens: TokenSet, remove: int, work: Work, seed: int
    ) -> Outcome:
        """Draw ``remove`` blocks without replacement; costs nothing."""
        drawn = np.random.default_rng(seed).choice(len(replay), remove, replace=False)
        return Outcome(tuple(sorted(drawn.tolist())), passes=0.0)
