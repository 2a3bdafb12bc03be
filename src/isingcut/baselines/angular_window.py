"""`angular-window`: remove the M consecutive blocks that together rotate the stream least.

    d(l) = E [ arccos(cos(x_l, x_l+M)) ] / pi

with x_l the stream that enters block l, x_N the one that leaves the last; the window starts at
the l of lowest d. The published mean is over the last token of each sample; `positions="all"`
takes every token.

Source: Gromov et al., arXiv 2403.17887, section 3.2 (without its healing).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from isingcut.baselines.base import Outcome, check_count
from isingcut.data.calibration import TokenSet
from isingcut.errors import InputError
from isingcut.measure.streams import angle, boundaries
from isingcut.measure.work import Work
from isingcut.models.replay import Replay

__all__ = ["AngularWindow"]

POSITIONS = ("last", "all")


@dataclass(frozen=True)
class AngularWindow:
    """The contiguous window of least angular distance.

    Attributes:
        positions: ``"last"`` token of each sample, as published, or ``"all"``.
    """

    positions: str = "last"

    def choose(
        self, replay: Replay, tokens: TokenSet, remove: int, work: Work, seed: int
    ) -> Outcome:
        """Choose the window; ``seed`` has no effect.

        Raises:
            InputError: impossible number of removals, or unknown ``positions``.
        """
        check_count(replay, remove)
        if self.positions not in POSITIONS:
            raise InputError(
                f"positions must be one of {', '.join(POSITIONS)}; got {self.positions!r}"
            )
        sums, count = np.zeros(len(replay) - remove + 1), 0
        batches = tokens.batches(work.batch_tokens)
        last = self.positions == "last"
        steps = len(replay) * len(batches)
        streams: list[list[Tensor]] = [[] for _ in batches]
        with work.progress("comparing block outputs", steps) as bar, torch.inference_mode():
            # In float32, twice as wide at most.
            kept = 0 if last else 2 * (len(replay) + 1)
            for b, i, before, after in boundaries(replay, batches, kept=kept):
                looked_at = batches[b].last_looked_at if last else batches[b].looked_at
                looked_at, own = looked_at.to(replay.device), streams[b]
                own += [before[looked_at].float()] * (not own) + [after[looked_at].float()]
                bar.advance(1)
                if i + 1 == len(replay):
                    for start in range(len(sums)):
                        sums[start] += float(angle(own[start], own[start + remove]).sum())
                    count += len(own[0])
                    own.clear()
        distances = sums / count
        start = int(np.argmin(distances))
        info = {"distance": distances.tolist(), "positions": self.positions}
        return Outcome(tuple(range(start, start + remove)), passes=1.0, heads=0.0, info=info)
