"""Gradients of the loss in all gates, one row per sample, from one batched backward.

The loss of sample s is its mean token NLL. Every sample has its own gate on every block
(alpha, B x N, float32), so that the gradient of the *sum* of the sample losses in alpha holds
each sample's gradient in a row of its own. Only gates require a gradient: no parameter
gradient is ever allocated, and each linear layer pays for its input gradient only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from isingcut.data.calibration import TokenSet
from isingcut.measure.gates import gated_block
from isingcut.measure.loss_gradient import loss_gradient
from isingcut.measure.sharing import SharedJournal
from isingcut.measure.work import identity
from isingcut.models.compute.attention import chosen_attention
from isingcut.models.compute.head import OutputHead
from isingcut.models.replay import Replay, reuse_freed_memory
from isingcut.progress import Progress, silent


def gate_gradients(
    replay: Replay,
    tokens: TokenSet,
    *,
    gate: str = "sublayer",
    label_seed: int | None = None,
    batch_tokens: int = 1024,
    progress: Progress = silent,
    journal: Path | None = None,
) -> npt.NDArray[np.float64]:
    """Gradient of each sample's mean token NLL in every gate, at the original model.

    Args:
        replay: the model's blocks; parameters must not require gradients.
        tokens: m samples; padding does not count.
        gate: ``"sublayer"`` (the paper's) or ``"block"``.
        label_seed: None takes the text's own next tokens as labels; a seed draws every label
            from the model's distribution instead. A sample's draws depend on the seed and its
            row alone, not on the batches.
        batch_tokens: tokens computed at a time.
        journal: file that keeps the rows of finished micro-batches.

    Returns:
        (m, N) float64, computed in float32, nats per token.

    Complexity: about 2 to 2.5 forward passes; activations of one micro-batch.

    Source: arXiv 2602.00161 (its gate gradients; the sign is that of d loss / d alpha).
    """
    for name, parameter in replay.model.named_parameters():
        assert not parameter.requires_grad, f"{name} requires a gradient"
    reuse_freed_memory()
    rows = np.zeros((tokens.samples, len(replay)))
    batches = tokens.batches(batch_tokens)
    measured = identity(replay, tokens, gate=gate, label_seed=label_seed, batch_tokens=batch_tokens)
    kept = SharedJournal(journal, measured, of_batches(batches, len(replay)), replay.processes)
    with (
        progress(f"gradients of {tokens.samples} samples", len(batches)) as bar,
        chosen_attention(replay),
    ):
        if replay.streamed:
            from isingcut.measure.streamed.gradients import streamed_gradients

            streamed_gradients(replay, batches, gate, label_seed, kept, bar, journal)
        else:
            head = OutputHead(replay)
            keys = [str(b) for b in range(len(batches))]
            todo = [key for key in keys if kept.get(key) is None]
            bar.advance(len(keys) - len(todo))
            own, bar = kept.share(todo, bar)
            for key in own:
                row = _batch_rows(replay, head, batches[int(key)], gate, label_seed)
                kept.put(key, row.double().cpu().numpy())
                bar.advance(1)
            kept.gather()
    for b, batch in enumerate(batches):
        rows[batch.index.numpy()] = kept.get(str(b))
    return rows


def of_batches(
    batches: Sequence[TokenSet], *shape: int
) -> Callable[[str, npt.NDArray[np.float64]], bool]:
    """Whether a journal's row can be a micro-batch's, with ``shape`` for each of its samples."""

    def fits(key: str, row: npt.NDArray[np.float64]) -> bool:
        return key.isdecimal() and row.shape == (batches[int(key)].samples, *shape)

    return fits


def _batch_rows(
    replay: Replay, head: OutputHead, batch: TokenSet, gate: str, label_seed: int | None
) -> Tensor:
    """(B, N) float32 gate gradients of one micro-batch."""
    with torch.no_grad():
        recording = replay.record(batch.input_ids)
    alphas = [
        torch.ones(batch.samples, device=replay.device, requires_grad=True)
        for _ in range(len(replay))
    ]
    hidden = recording.entered  # (B, T, D)
    for i, alpha in enumerate(alphas):
        hidden = gated_block(recording, i, hidden, alpha, gate, ones=True)
    toward_stream = loss_gradient(recording, hidden.detach(), batch, label_seed, head)
    gradients = torch.autograd.grad(hidden, alphas, toward_stream)
    return torch.stack(gradients, dim=1)
