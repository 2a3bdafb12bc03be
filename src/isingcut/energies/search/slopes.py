"""Slopes of the loss in every gate at a cut model, by one backward pass.

The gate of a kept block is 1, that of a removed block 0, and the KL to the original is
differentiated in all gates. For a removed block, the slope is the first-order gain of restoring it,
which no measured removal shows. For a kept block it predicts the cost of a removal poorly
(docs/experiments.md) and is not used.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from isingcut.data.tokens import TokenSet
from isingcut.ising.states import Bools, Floats
from isingcut.measure.splitting import split_to_fit
from isingcut.measure.sweep import gate_chunks, gate_rows
from isingcut.models.compute.head import divergence_gradient
from isingcut.models.replay import Recording, Replay

PASSES = 4.0
"""Cost in forward passes: the original, the gated model, and a backward pass of twice that."""


def gate_slopes(replay: Replay, tokens: TokenSet, state: Bools, batch_tokens: int) -> Floats:
    """Compute d KL(original || cut) / d alpha of each block's gate, in nats per token: (N,).

    Args:
        state: (N,) bool; the gates of its blocks are 0, all others 1.
    """

    def toward(recording: Recording, batch: TokenSet, cut: Tensor, original: Tensor) -> Tensor:
        return divergence_gradient(recording, original, cut, batch)

    total = np.zeros(len(replay))
    batches = tokens.batches(batch_tokens)
    for chunk, room in gate_chunks(replay, batches):

        def compute(some: Sequence[TokenSet], room: int = room) -> list[Tensor]:
            return gate_rows(replay, some, "block", toward, removed=state, room=room)

        for rows in split_to_fit(
            replay.limit, batches[chunk], compute, lambda a, b: torch.cat([a, b])
        ):
            total += rows.T.contiguous().sum(1).double().cpu().numpy()
    return total / tokens.tokens
