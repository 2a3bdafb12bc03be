"""Slopes of the loss in every gate at a cut model: one backward pass around a state.

The gate of a kept block stands at 1, that of a removed block at 0, and the KL to the original
is differentiated in all of them. For a removed block the slope is the first-order gain of
putting it back, which no measured removal tells; for a kept one it is a weak guide to removing
it (docs/experiments.md), and is not used for that.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from isingcut.data.tokens import TokenSet
from isingcut.ising.states import Bools, Floats
from isingcut.measure.gates import gated_block
from isingcut.models.replay import Recording, Replay

PASSES = 4.0
"""Price in forward passes: the original, the gated model, and a backward pass of twice that."""


def gate_slopes(replay: Replay, tokens: TokenSet, state: Bools, batch_tokens: int) -> Floats:
    """d KL(original || cut) / d alpha of each block's gate, in nats per token: (N,).

    Args:
        state: (N,) bool; its blocks' gates stand at 0, all others at 1.
    """
    batches = tokens.batches(batch_tokens)
    if replay.streamed:
        from isingcut.measure.streamed.slopes import streamed_slopes

        return streamed_slopes(replay, batches, state, _toward) / tokens.tokens
    total = np.zeros(len(replay))
    for batch in batches:
        total += _batch(replay, batch, state)
    return total / tokens.tokens


def _batch(replay: Replay, batch: TokenSet, state: Bools) -> Floats:
    with torch.no_grad():
        recording = replay.record(batch.input_ids)
        original = recording.entered
        for i in range(len(replay)):
            original = recording.block(i, original)
    alphas = [
        torch.full((batch.samples,), 0.0 if gone else 1.0, device=replay.device).requires_grad_()
        for gone in state
    ]
    hidden = recording.entered
    for i, alpha in enumerate(alphas):
        hidden = gated_block(recording, i, hidden, alpha, "block", ones=not state[i])
    toward = _toward(recording, original, hidden.detach(), batch)
    gradients = torch.autograd.grad(hidden, alphas, toward)
    return np.asarray(torch.stack(gradients).sum(1).double().cpu().numpy())


def _toward(recording: Recording, original: Tensor, hidden: Tensor, batch: TokenSet) -> Tensor:
    """Gradient (B, T, D) of the summed KL in the stream that leaves the cut blocks."""
    out = torch.empty_like(hidden)
    for s in range(batch.samples):
        with torch.no_grad():
            p = torch.softmax(recording.logits(original[s], s).float(), dim=-1)
        leaf = hidden[s].requires_grad_(True)
        logits = recording.logits(leaf, s)  # (T, V)
        difference = torch.softmax(logits.detach().float(), dim=-1) - p
        predicted = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
        predicted[: batch.predicted.shape[1]] = batch.predicted[s].to(logits.device)
        difference[~predicted] = 0.0
        (out[s],) = torch.autograd.grad(logits, leaf, difference.to(logits.dtype))
    return out
