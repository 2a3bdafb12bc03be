"""`norm-ratio`: remove the blocks that add least to the hidden states, relative to their output.

    R_i = E_t [ |f_i(x_t) - x_t| / |f_i(x_t)| ]

with f_i(x) the hidden state after block i.

Source: the relative magnitude of Samragh et al. (weight subcloning), arXiv 2312.09299, which
ShortGPT (arXiv 2403.03853) compares its block influence with as a layer metric.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from isingcut.baselines.base import Outcome, check_count
from isingcut.data.tokens import TokenSet
from isingcut.measure.streams import block_means, pick_blocks
from isingcut.measure.work import Work
from isingcut.models.replay import Replay

__all__ = ["NormRatio"]


@dataclass(frozen=True)
class NormRatio:
    """The relative size of each block's addition to the hidden states."""

    def choose(
        self, replay: Replay, tokens: TokenSet, remove: int, work: Work, seed: int
    ) -> Outcome:
        """Choose the blocks of lowest ratio; ``seed`` has no effect."""
        check_count(replay, remove)
        scores = block_means(replay, tokens, work, ratio)
        info = {"norm_ratio": scores.tolist()}
        return Outcome(pick_blocks(scores, remove), passes=1.0, heads=0.0, info=info)


def ratio(before: Tensor, after: Tensor) -> Tensor:
    """Return the norm of the difference over that of ``after`` (K,), for hidden states (K, D)."""
    added: Tensor = torch.linalg.vector_norm(after - before, dim=-1)
    whole: Tensor = torch.linalg.vector_norm(after, dim=-1)
    return added.div(whole)
