"""Before and after on unseen text when neither model fits the memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from isingcut.console.progress import Progress, silent
from isingcut.evaluation.quality import compared, disk_bytes, evaluation_document, quality_of
from isingcut.measure.pace import Pace
from isingcut.models.parts import HEAD
from isingcut.models.replay import Recording
from isingcut.models.streaming.replay import StreamedReplay
from isingcut.options.types import BATCH_TOKENS

if TYPE_CHECKING:
    from isingcut.data.tokens import TokenSet

# The stream that leaves the blocks, what entered them, and the one that is being made; of both.
_STREAMS = 6


def evaluate_streamed(
    original: StreamedReplay,
    cut: StreamedReplay,
    tokens: TokenSet,
    *,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Quality and size of both models, as `evaluation.json` keeps them.

    Speed, memory and a generation are left out: a model that is read from disk for every token
    has no speed that says anything about the model.

    Args:
        original, cut: on the same buffers.
        tokens: the report split.
        batch_tokens: tokens computed at a time.
    """
    found = quality_streamed(original, cut, tokens, batch_tokens, progress=progress)
    figures = {
        name: {
            "parameters": sum(p.numel() for p in replay.model.parameters()),
            "bytes": disk_bytes(replay.store.folder),
            "blocks": len(replay),
        }
        for name, replay in (("before", original), ("after", cut))
    }
    return evaluation_document(found, figures, tokens, original, generation=None, streamed=True)


def quality_streamed(
    original: StreamedReplay,
    cut: StreamedReplay,
    tokens: TokenSet,
    batch_tokens: int = BATCH_TOKENS,
    *,
    progress: Progress = silent,
) -> dict[str, Any]:
    """NLL and perplexity of both and KL(original || cut), as `isingcut.evaluation.quality.quality`.

    Complexity: each model is read once per chunk of samples; both heads are in memory together.
    """
    sums = np.zeros((3, tokens.samples))
    batches, pace = tokens.batches(batch_tokens), Pace(original.store)
    with progress("perplexity and KL on unseen text", len(batches)) as bar, torch.inference_mode():
        for chunk, _ in pace.chunks(original, batches, _STREAMS):
            ends = [_through(replay, batches[chunk]) for replay in (original, cut)]
            for replay in (original, cut):
                replay.store.hold(HEAD)
            for batch, before, after in zip(batches[chunk], *ends, strict=True):
                for row, position in enumerate(batch.index.tolist()):
                    sums[:, position] = _losses(batch, row, before, after)
                bar.advance(1)
    return quality_of(sums, tokens)


def _through(replay: StreamedReplay, batches: Sequence[TokenSet]) -> list[tuple[Recording, Tensor]]:
    """The recording of each batch, and the stream that leaves the blocks."""
    recordings = [replay.record(batch.input_ids) for batch in batches]
    streams = [recording.entered for recording in recordings]
    for i in range(len(replay)):
        for b, recording in enumerate(recordings):
            streams[b] = recording.block(i, streams[b])
    return list(zip(recordings, streams, strict=True))


def _losses(
    batch: TokenSet, row: int, before: tuple[Recording, Tensor], after: tuple[Recording, Tensor]
) -> tuple[float, float, float]:
    end = int(batch.predicted[row].sum())
    first, second = (recording.logits(end_[row], row)[:end] for recording, end_ in (before, after))
    labels = batch.input_ids[row, 1 : end + 1].to(first.device)
    return compared(first, second, labels)
