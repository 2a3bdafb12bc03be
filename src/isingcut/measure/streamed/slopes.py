"""Slopes of the loss in the gates of a cut model, block by block: two sweeps over the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from isingcut.data.tokens import TokenSet
from isingcut.measure.streamed.boundary import Boundaries
from isingcut.measure.streamed.graphs import gated
from isingcut.models.replay import Recording, Replay
from isingcut.models.streaming.plan import EMBED, HEAD
from isingcut.models.streaming.replay import StreamedReplay

Toward = Callable[[Recording, Tensor, Tensor, TokenSet], Tensor]


def streamed_slopes(
    replay: Replay, batches: Sequence[TokenSet], state: npt.NDArray[np.bool_], toward_of: Toward
) -> npt.NDArray[np.float64]:
    """(N,) slopes of the summed loss in every gate, all micro-batches in one chunk.

    Args:
        state: (N,) bool; its blocks' gates stand at 0, all others at 1.
        toward_of: the gradient (B, T, D) of the loss in the stream that leaves the cut blocks,
            from a recording, the original's stream, the cut one and the batch.

    Complexity: each block is read twice. A removed block lets the gradient pass unchanged, so
    that going back it is only run forward; streams that do not fit the memory go to a file.
    """
    assert isinstance(replay, StreamedReplay)
    n = len(replay)
    recordings: list[Recording] = []
    original: list[Tensor] = []
    toward: list[Tensor] = []
    slopes = torch.zeros(n, dtype=torch.float64)
    # The original's stream and the gradient stay in memory, whatever is allowed for the others.
    room = replay.room(batches[0]) - 3 * sum(replay.stream_bytes(batch) for batch in batches)
    with closing(Boundaries(max(0, room))) as boundaries:
        for part in replay.store.sweep([EMBED, *range(n), HEAD, *reversed(range(n))]):
            if part == EMBED:
                with torch.no_grad():
                    recordings = [replay.record(batch.input_ids) for batch in batches]
                original = [recording.entered for recording in recordings]
                for b, recording in enumerate(recordings):
                    boundaries.put((0, b), recording.entered)
            elif part == HEAD:
                for b, (recording, batch) in enumerate(zip(recordings, batches, strict=True)):
                    cut = boundaries.take((n, b), replay.device)
                    toward.append(toward_of(recording, original[b], cut, batch))
            elif not toward:
                assert isinstance(part, int)
                with torch.no_grad():
                    for b, recording in enumerate(recordings):
                        cut = boundaries.get((part, b), replay.device)
                        original[b] = recording.block(part, original[b])
                        after = cut if state[part] else recording.block(part, cut)
                        boundaries.put((part + 1, b), after)
            else:
                assert isinstance(part, int)
                for b, recording in enumerate(recordings):
                    before = boundaries.take((part, b), replay.device)
                    if state[part]:
                        with torch.no_grad():
                            change = recording.block(part, before) - before
                        rows = (toward[b].float() * change.float()).flatten(1).sum(1)
                    else:
                        block = gated(recording, part, before, "block")
                        rows, toward[b] = block.backward(toward[b])
                    slopes[part] += rows.double().sum().cpu()
    return np.asarray(slopes.numpy())
