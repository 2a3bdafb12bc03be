"""Gate gradients, block by block: a forward sweep that keeps the stream between blocks, and a
backward sweep that pulls the gradient through each block, computed again unless its graph was
kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from isingcut.data.tokens import TokenSet
from isingcut.measure.gates import gated_block
from isingcut.measure.loss_gradient import loss_gradient
from isingcut.measure.sharing import SharedJournal
from isingcut.measure.streamed.boundary import Boundaries
from isingcut.measure.streamed.graphs import Graphs, gated
from isingcut.measure.streamed.pace import Pace
from isingcut.models.replay import Recording, Replay
from isingcut.models.streaming.plan import EMBED, HEAD
from isingcut.models.streaming.replay import BLOCK_STREAMS, StreamedReplay
from isingcut.progress import Bar


def streamed_gradients(
    replay: Replay,
    batches: Sequence[TokenSet],
    gate: str,
    label_seed: int | None,
    kept: SharedJournal,
    bar: Bar,
    journal: Path | None = None,
) -> None:
    """Put the rows of all micro-batches that the journal lacks into it.

    Args:
        batches: micro-batches of a token set; the rows of number b have the key ``str(b)``.
        gate, label_seed: as in `isingcut.measure.gradients.gate_gradients`.
        journal: its file; hidden states that do not fit the memory allowed go beside it.

    Complexity: each block is read twice per chunk. Of the last blocks, as many as there is room
    for, the graphs are kept; the others are computed once more than in memory.
    """
    assert isinstance(replay, StreamedReplay)
    n = len(replay)
    todo = [b for b in range(len(batches)) if kept.get(str(b)) is None]
    bar.advance(len(batches) - len(todo))
    pace = Pace(replay.store.buffers)
    keys, bar = kept.share([str(b) for b in todo], bar)
    own = [int(key) for key in keys]
    while own:
        room = replay.room(batches[own[0]])
        # A stream before and after every block, what entered (the recording has it), and two
        # gradients.
        costs = np.cumsum([(n + 4) * replay.stream_bytes(batches[b]) for b in own])
        chunk = own[: max(1, min(pace.batches, int((costs <= room).sum())))]
        guess = BLOCK_STREAMS * replay.stream_bytes(batches[chunk[0]])
        graphs = Graphs(replay.store, room - int(costs[len(chunk) - 1]), guess)
        with (
            pace.timed(len(chunk)),
            closing(Boundaries(room, journal.parent if journal else None)) as boundaries,
        ):
            found = _sweep(
                replay, [batches[b] for b in chunk], gate, label_seed, boundaries, graphs, bar
            )
        for b, rows in zip(chunk, found, strict=True):
            kept.put(str(b), rows.double().cpu().numpy())
        own = own[len(chunk) :]
    kept.gather()


def _sweep(
    replay: StreamedReplay,
    batches: Sequence[TokenSet],
    gate: str,
    label_seed: int | None,
    boundaries: Boundaries,
    graphs: Graphs,
    bar: Bar,
) -> list[Tensor]:
    """(B, N) float32 gate gradients of each micro-batch."""
    n = len(replay)
    recordings: list[Recording] = []
    toward: list[Tensor] = []
    rows = [torch.zeros(batch.samples, n, device=replay.device) for batch in batches]
    forward = [torch.ones(batch.samples, device=replay.device) for batch in batches]
    for part in replay.store.sweep([EMBED, *range(n), HEAD, *reversed(range(n))]):
        if part == EMBED:
            with torch.no_grad():
                for b, batch in enumerate(batches):
                    recordings.append(replay.record(batch.input_ids))
                    boundaries.put((0, b), recordings[b].entered)
        elif part == HEAD:
            for b, batch in enumerate(batches):
                stream = boundaries.take((n, b), replay.device)
                toward.append(loss_gradient(recordings[b], stream, batch, label_seed, replay.head))
        elif not toward:
            assert isinstance(part, int)
            for b, recording in enumerate(recordings):
                before = boundaries.get((part, b), replay.device)
                if graphs.has_room((n - part) * len(batches) - b):
                    after = graphs.run(recording, part, b, before, gate)
                else:
                    with torch.no_grad():
                        after = gated_block(recording, part, before, forward[b], gate, ones=True)
                boundaries.put((part + 1, b), after)
                bar.advance(1 / (2 * n))
        else:
            assert isinstance(part, int)
            for b, recording in enumerate(recordings):
                before = boundaries.take((part, b), replay.device)
                block = graphs.take(part, b) or gated(recording, part, before, gate)
                rows[b][:, part], toward[b] = block.backward(toward[b])
                bar.advance(1 / (2 * n))
    return rows
