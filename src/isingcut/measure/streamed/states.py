"""Measured losses of states, block by block: `isingcut.measure.losses` the other way round.

All branches of the prefix tree that are alive at a block are advanced while the block is in
memory. The states are sorted by their bits, so that a branch at depth i is a range of states
that agree on their first i blocks; it keeps one stream, and is parted where the next bit
differs. At the end each distinct state has a stream: their number times the tokens of a chunk
is what has to fit the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from torch import Tensor

from isingcut.data.tokens import TokenSet
from isingcut.errors import InputError
from isingcut.ising.states import Floats, States
from isingcut.measure.sharing import SharedJournal
from isingcut.measure.streamed.pace import Pace
from isingcut.models.compute.head import OutputHead, comparison
from isingcut.models.replay import Recording, Replay
from isingcut.models.streaming.plan import EMBED, HEAD
from isingcut.models.streaming.replay import StreamedReplay
from isingcut.progress import Bar

# Streams of a batch beside those of the states: the original's, what entered the blocks (the
# recording has it), and the one that a block is just making.
_OTHERS = 3


@dataclass(frozen=True)
class Task:
    """States of one micro-batch that are still to be measured, in the order of their bits."""

    number: int
    batch: TokenSet
    states: npt.NDArray[np.int64]


def streamed_sums(
    replay: Replay, batches: Sequence[TokenSet], states: States, kept: SharedJournal, bar: Bar
) -> Floats:
    """KL and NLL sums of states, each block read once per chunk of samples and states.

    Args:
        batches: micro-batches of a token set.
        states: (S, N).
        kept: has what is finished, by micro-batch and states; any chunks may go on from it.
        bar: counts block evaluations.

    Returns:
        (2, S + 1, m): KL and NLL of each state and, last, of the original.

    Raises:
        InputError: not even one state of one micro-batch fits the memory allowed.
    """
    assert isinstance(replay, StreamedReplay)
    sums = np.zeros((2, len(states) + 1, sum(batch.samples for batch in batches)))
    # lexsort's last key is the first to sort by.
    order = np.lexsort(states.T[::-1]) if len(states) else np.zeros(0, dtype=np.int64)
    todo: list[Task] = []
    for number, batch in enumerate(batches):
        done = _finished(kept, number, batch, sums)
        if done is None or not done.issuperset(order.tolist()):
            left = [s for s in order.tolist() if s not in (done or ())]
            todo.append(Task(number, batch, np.array(left, dtype=np.int64)))
    pace = Pace(replay.store.buffers)
    keys, bar = kept.share([str(task.number) for task in todo], bar)
    own = [task for task in todo if str(task.number) in keys]
    while own:
        chunk = _next_chunk(replay, own, pace.batches)
        with pace.timed(len(chunk)):
            found = _sweep(replay, [t.batch for t in chunk], states[chunk[0].states], bar)
        for task, rows in zip(chunk, found, strict=True):
            _keep(kept, task.number, np.append(task.states, len(states)), rows)
        measured = len(chunk[0].states)
        rest = [replace(t, states=t.states[measured:]) for t in own[: len(chunk)]]
        own = [t for t in rest if len(t.states)] + own[len(chunk) :]
    kept.gather()
    for number, batch in enumerate(batches):
        _finished(kept, number, batch, sums)
    return sums


def _keep(kept: SharedJournal, number: int, positions: npt.NDArray[np.int64], rows: Floats) -> None:
    """Rows (2, K, B) with the states they belong to, so that other chunks can go on from them."""
    labels = np.broadcast_to(positions[None, :, None].astype(np.float64), (1, *rows.shape[1:]))
    first = int(positions[0])
    kept.put(f"{number}:{first}", np.concatenate([labels, rows]))


def fits_states(key: str, row: Floats, batches: Sequence[TokenSet], states: int) -> bool:
    """Whether a journal's row can be one of `_keep`'s; the original's number is ``states``."""
    number = key.partition(":")[0]
    batch = batches[int(number)]
    if row.ndim != 3 or row.shape[0] != 3 or row.shape[2] != batch.samples or not row.size:
        return False
    labels = row[0, :, :1]
    known = np.isin(labels, np.arange(states + 1)).all() and (row[0] == labels).all()
    return bool(known) and key == f"{int(number)}:{int(labels[0, 0])}" and int(number) >= 0


def _finished(kept: SharedJournal, number: int, batch: TokenSet, sums: Floats) -> set[int] | None:
    """Fill in what the journal has of a micro-batch; its states, or None if there is nothing."""
    done: set[int] | None = None
    for key in kept.keys():  # noqa: SIM118
        if key.partition(":")[0] != str(number):
            continue
        row = kept.get(key)
        assert row is not None
        positions = row[0, :, 0].astype(np.int64)
        sums[:, positions[:, None], batch.index.numpy()] = row[1:]
        done = (done or set()) | set(positions.tolist())
    return done


def _next_chunk(replay: StreamedReplay, todo: Sequence[Task], most: int) -> list[Task]:
    """The next micro-batches with all their states; of one, as many states as fit."""
    first = todo[0]
    each = replay.stream_bytes(first.batch)
    room = replay.room(first.batch)
    streams = len(first.states) + _OTHERS
    if streams * each > room:
        fit = room // each - _OTHERS
        if fit < 1:
            raise InputError(
                f"hidden states may take {room / 1e6:.0f} MB, and one state of "
                f"{first.batch.input_ids.numel()} tokens takes {(_OTHERS + 1) * each / 1e6:.0f} "
                "MB; raise --memory-limit or lower --batch-tokens"
            )
        pieces = -(-len(first.states) // fit)
        return [replace(first, states=first.states[: -(-len(first.states) // pieces)])]
    chunk, used = [first], streams * each
    for task in todo[1:most]:
        used += streams * replay.stream_bytes(task.batch)
        if used > room or not np.array_equal(task.states, first.states):
            break
        chunk.append(task)
    return chunk


def _sweep(
    replay: StreamedReplay, batches: Sequence[TokenSet], states: States, bar: Bar
) -> list[Floats]:
    """For each micro-batch (2, K + 1, B): KL and NLL of K sorted states and of the original."""
    n = len(replay)
    walk = np.concatenate([np.zeros((1, n), dtype=bool), states])
    branches = [(0, len(walk))]
    recordings: list[Recording] = []
    streams: list[list[Tensor]] = []
    found: list[Floats] = []
    for part in replay.store.sweep([EMBED, *range(n), HEAD]):
        if part == EMBED:
            recordings = [replay.record(batch.input_ids) for batch in batches]
            streams = [[recording.entered] for recording in recordings]
        elif part == HEAD:
            for batch, recording, ends in zip(batches, recordings, streams, strict=True):
                found.append(_losses(batch, replay.head, recording, branches, ends))
        else:
            assert isinstance(part, int)
            parted = [(lo, lo + int((~walk[lo:hi, part]).sum()), hi) for lo, hi in branches]
            for recording, alive in zip(recordings, streams, strict=True):
                bar.advance(_advance(recording, part, parted, alive))
            branches = [
                (a, b) for lo, mid, hi in parted for a, b in ((lo, mid), (mid, hi)) if a < b
            ]
    # The original came first; it is wanted last.
    return [np.roll(rows, -1, axis=1) for rows in found]


def _advance(
    recording: Recording, block: int, parted: Sequence[tuple[int, int, int]], alive: list[Tensor]
) -> int:
    """Run a block on every branch that has it, in place; a branch may become two, or stay."""
    old, ran = alive[::-1], 0
    alive.clear()
    for lo, mid, hi in parted:
        stream = old.pop()
        if lo < mid:
            alive.append(recording.block(block, stream))
            ran += 1
        if mid < hi:
            alive.append(stream)
    return ran


def _losses(
    batch: TokenSet,
    head: OutputHead,
    recording: Recording,
    branches: Sequence[tuple[int, int]],
    ends: Sequence[Tensor],
) -> Floats:
    """(2, K + 1, B) KL and NLL sums, from the stream that leaves the blocks on each branch."""
    out = np.zeros((2, branches[-1][1], batch.samples))
    # Of the sorted states the one that removes nothing comes first: the original.
    original = comparison(head, recording, ends[0], batch)
    for (lo, hi), stream in zip(branches, ends, strict=True):
        if lo or hi > 1:
            kl, nll = original.compare(stream)
            out[0, lo:hi], out[1, lo:hi] = kl, nll
    out[0, 0], out[1, 0] = 0.0, original.nll
    return out
