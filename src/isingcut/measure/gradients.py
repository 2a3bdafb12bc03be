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

from isingcut.console.progress import Progress, silent
from isingcut.data.calibration import TokenSet
from isingcut.measure.sharing import SharedJournal
from isingcut.measure.splitting import split_to_fit
from isingcut.measure.streams import check_finite
from isingcut.measure.sweep import gate_chunks, gate_rows
from isingcut.measure.work import identity
from isingcut.models.compute.head import OutputHead, loss_gradient
from isingcut.models.replay import Recording, Replay, chosen_attention, reuse_freed_memory
from isingcut.options.config import BATCH_TOKENS


def gate_gradients(
    replay: Replay,
    tokens: TokenSet,
    *,
    gate: str = "sublayer",
    label_seed: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
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

    Complexity: about 2 to 2.5 forward passes, 3 where activations do not fit; activations of one
    micro-batch. A streamed model is read twice for each chunk of them.

    Source: arXiv 2602.00161 (its gate gradients; the sign is that of d loss / d alpha).
    """
    for name, parameter in replay.model.named_parameters():
        assert not parameter.requires_grad, f"{name} requires a gradient"
    reuse_freed_memory()
    batches = tokens.batches(batch_tokens)
    how = {"gate": gate, "label_seed": label_seed, "batch_tokens": batch_tokens}
    measured = identity(replay, tokens, **how)
    kept = SharedJournal(journal, measured, of_batches(batches, len(replay)), replay.processes)
    with (
        progress(f"gradients of {tokens.samples} samples", len(batches)) as bar,
        chosen_attention(replay),
    ):
        head = OutputHead(replay)

        def toward(recording: Recording, batch: TokenSet, stream: Tensor, _: Tensor) -> Tensor:
            return loss_gradient(recording, stream, batch, label_seed, head)

        keys = [str(b) for b in range(len(batches))]
        todo = [key for key in keys if kept.get(key) is None]
        bar.advance(len(keys) - len(todo))
        own, bar = kept.share(todo, bar)
        mine = [batches[int(key)] for key in own]
        for chunk, room in gate_chunks(replay, mine):

            def compute(some: Sequence[TokenSet], room: int = room) -> list[Tensor]:
                return gate_rows(
                    replay,
                    some,
                    gate,
                    toward,
                    room=room,
                    folder=journal.parent if journal else None,
                    advance=bar.advance,
                )

            found = split_to_fit(replay.limit, mine[chunk], compute, lambda a, b: torch.cat([a, b]))
            for key, row in zip(own[chunk], found, strict=True):
                numbers = row.double().cpu().numpy()
                check_finite(replay, batches[int(key)], numbers)
                kept.put(key, numbers)
        kept.gather()
    rows = np.zeros((tokens.samples, len(replay)))
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
