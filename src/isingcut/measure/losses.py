"""Measured loss of states: KL to the original model and NLL, in nats per token.

States are visited in the order of their bits, so that two states that agree on the first
blocks share the hidden states up to where they part: each node of the tree of decisions is
computed once. The original model is the empty state, so that every measurement brings its own
reference. Work goes by micro-batches, and a finished micro-batch is written to a journal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from isingcut.data.calibration import TokenSet
from isingcut.files import without_infinities
from isingcut.ising.states import Floats, States
from isingcut.measure.pieces import Piece, common_prefix, left
from isingcut.measure.sharing import SharedJournal
from isingcut.measure.work import identity
from isingcut.models.compute.attention import chosen_attention
from isingcut.models.compute.head import OutputHead, Reference, comparison
from isingcut.models.replay import Replay, reuse_freed_memory
from isingcut.progress import Bar, Progress, silent

__all__ = ["Measurement", "Reference", "measure", "standard_error"]


@dataclass(frozen=True, eq=False)
class Measurement:
    """Losses of S states on m samples.

    Attributes:
        states: (S, N) bool, True where a block is removed.
        kl_sums: (S, m) KL(original || state), summed over a sample's tokens, nats.
        nll_sums: (S, m) negative log-likelihood, summed over a sample's tokens, nats.
        original_nll_sums: (m,) the same for the original model.
        counts: (m,) predicted, non-padding tokens of each sample.
        blocks_run: block evaluations done, per sample of the token set.
        blocks_unshared: what removing the blocks state by state would have run.
    """

    states: States
    kl_sums: Floats
    nll_sums: Floats
    original_nll_sums: Floats
    counts: npt.NDArray[np.int64]
    blocks_run: int
    blocks_unshared: int

    @property
    def kl(self) -> Floats:
        """(S,) mean KL per token."""
        return np.asarray(self.kl_sums.sum(1) / self.counts.sum())

    @property
    def nll(self) -> Floats:
        """(S,) mean NLL per token."""
        return np.asarray(self.nll_sums.sum(1) / self.counts.sum())

    @property
    def kl_se(self) -> Floats:
        """(S,) standard error of `kl` over samples (ratio estimator)."""
        return standard_error(self.kl_sums, self.counts)

    @property
    def nll_se(self) -> Floats:
        """(S,) standard error of `nll` over samples (ratio estimator)."""
        return standard_error(self.nll_sums, self.counts)

    def losses(self, state: int) -> dict[str, Any]:
        """KL and NLL of one state, each with its error or None, as results files keep them."""
        return {
            "kl": float(self.kl[state]),
            "kl_se": without_infinities(float(self.kl_se[state])),
            "nll": float(self.nll[state]),
            "nll_se": without_infinities(float(self.nll_se[state])),
        }


def standard_error(sums: Floats, counts: npt.NDArray[np.int64]) -> Floats:
    """Standard error of sum(sums) / sum(counts) over samples, by linearisation.

    Args:
        sums: (..., m) per-sample sums.
        counts: (m,) per-sample token counts.

    Returns:
        (...) standard errors; NaN for a single sample.
    """
    m = counts.size
    if m < 2:
        return np.full(sums.shape[:-1], np.nan)
    ratio = sums.sum(-1, keepdims=True) / counts.sum()
    residual = sums - ratio * counts
    return np.asarray(np.sqrt((residual**2).sum(-1) * m / (m - 1)) / counts.sum())


def measure(
    replay: Replay,
    tokens: TokenSet,
    states: States | Sequence[Sequence[int]],
    *,
    batch_tokens: int = 1024,
    progress: Progress = silent,
    description: str = "measuring states",
    journal: Path | None = None,
    share_prefixes: bool = True,
) -> Measurement:
    """Measure the KL to the original and the NLL of each state.

    Args:
        replay: the model's blocks.
        tokens: m samples.
        states: (S, N) bool.
        batch_tokens: tokens computed at a time; bounds memory, not the result.
        journal: file that keeps finished micro-batches; it is left for the caller to remove.
        share_prefixes: off only to measure what sharing saves.

    Complexity: one block evaluation per node of the prefix tree of the states and of the
    empty state, plus one output head per state.
    """
    wanted = np.asarray(states, dtype=bool).reshape(-1, len(replay))
    n = len(replay)
    # Lexicographic by bits: neighbours share the longest prefixes. lexsort's last key is first.
    order = np.lexsort(wanted.T[::-1]) if len(wanted) else np.zeros(0, dtype=np.int64)
    walk = [_Step(wanted[s], int(s)) for s in order]
    empty = np.zeros(n, dtype=bool)
    previous = empty
    for step in walk:
        step.shared = common_prefix(previous, step.removed) if share_prefixes else 0
        previous = step.removed
    per_batch = n + sum(int((~s.removed[s.shared :]).sum()) for s in walk)
    unshared = n + int((~wanted).sum())

    reuse_freed_memory()
    batches = tokens.batches(batch_tokens)

    def fits(key: str, row: npt.NDArray[np.float64]) -> bool:
        if replay.streamed:
            from isingcut.measure.streamed.states import fits_states

            return fits_states(key, row, batches, len(wanted))
        piece = Piece.read(key)
        states = range(len(wanted) + 1)
        inside = piece.key == key and piece.first in states and piece.last in states
        shape = (2, piece.last - piece.first + 1, batches[piece.batch].samples)
        return inside and piece.batch >= 0 and row.shape == shape

    measured = identity(
        replay,
        tokens,
        states=np.packbits(wanted).tolist(),
        shape=list(wanted.shape),
        batch_tokens=batch_tokens,
    )
    kept = SharedJournal(journal, measured, fits, replay.processes)
    m = tokens.samples
    counts = tokens.predicted.sum(1).numpy().astype(np.int64)
    sums = np.zeros((2, len(wanted) + 1, m))
    seen = np.zeros((len(wanted), m), dtype=bool)
    with (
        progress(description, per_batch * len(batches)) as bar,
        torch.inference_mode(),
        chosen_attention(replay),
    ):
        if replay.streamed:
            from isingcut.measure.streamed.states import streamed_sums

            sums = streamed_sums(replay, batches, wanted, kept, bar)
        else:
            head = OutputHead(replay)

            def fill(key: str) -> None:
                piece = Piece.read(key)
                places = batches[piece.batch].index.numpy()
                row = kept.get(key)
                assert row is not None
                states = [s.position for s in walk[piece.first : piece.last]]
                sums[:, np.array([*states, len(wanted)])[:, None], places] = row
                if states:
                    seen[np.array(states)[:, None], places] = True
                    # Samples that a state was not measured on yet count nothing on either side.
                    mean = sums[0, :-1].sum(1) / np.maximum(1, seen @ counts)
                    bar.advance(0, f"lowest KL so far {mean[seen.any(1)].min():.4f}")

            for key in kept.keys():  # noqa: SIM118
                bar.advance(_blocks_run(walk, Piece.read(key), n))
                fill(key)
            size = replay.processes.size
            todo = left(kept.keys(), len(batches), len(walk), size, 2 * n / per_batch)
            own, bar = kept.share([piece.key for piece in todo], bar)
            for key in own:
                piece = Piece.read(key)
                steps = _apart(walk[piece.first : piece.last], share_prefixes)
                # What a parted micro-batch runs again is no progress.
                whole = len(steps) == len(walk)
                with silent("", 0) as quiet:
                    row = _measure_batch(
                        replay,
                        head,
                        batches[piece.batch],
                        steps,
                        len(wanted),
                        bar if whole else quiet,
                    )
                bar.advance(0 if whole else _blocks_run(walk, piece, n))
                kept.put(key, row[:, [*(s.position for s in steps), len(wanted)]])
                fill(key)
            kept.gather()
            for key in kept.keys():  # noqa: SIM118
                fill(key)
    return Measurement(wanted, sums[0, :-1], sums[1, :-1], sums[1, -1], counts, per_batch, unshared)


class _Step:
    """One state on the walk through the prefix tree."""

    def __init__(self, removed: npt.NDArray[np.bool_], position: int) -> None:
        self.removed, self.position, self.shared = removed, position, 0


def _apart(steps: Sequence[_Step], share_prefixes: bool) -> list[_Step]:
    """A stretch of the walk as a walk of its own: its first state shares with the original."""
    if not steps or not share_prefixes:
        return list(steps)
    first = _Step(steps[0].removed, steps[0].position)
    first.shared = common_prefix(np.zeros_like(first.removed), first.removed)
    return [first, *steps[1:]]


def _blocks_run(walk: Sequence[_Step], piece: Piece, n: int) -> int:
    """Blocks of one piece, as they count in all that a measurement runs."""
    own = walk[piece.first : piece.last]
    return sum(int((~s.removed[s.shared :]).sum()) for s in own) + (0 if piece.first else n)


def _measure_batch(
    replay: Replay,
    head: OutputHead,
    batch: TokenSet,
    walk: Sequence[_Step],
    count: int,
    bar: Bar,
) -> Floats:
    """(2, count + 1, B): KL and NLL sums of each state and, last, of the original."""
    n = len(replay)
    recording = replay.record(batch.input_ids)
    # stream[i] enters block i on the current path through the tree.
    stream: list[Tensor] = [recording.entered] * (n + 1)

    def run(removed: npt.NDArray[np.bool_], start: int) -> int:
        ran = 0
        for i in range(start, n):
            if removed[i]:
                stream[i + 1] = stream[i]
            else:
                stream[i + 1] = recording.block(i, stream[i])
                ran += 1
        return ran

    out = np.zeros((2, count + 1, batch.samples))
    bar.advance(run(np.zeros(n, dtype=bool), 0))
    original = comparison(head, recording, stream[n], batch)
    out[1, count] = original.nll
    for step in walk:
        ran = run(step.removed, step.shared)
        out[:, step.position] = original.compare(stream[n])
        bar.advance(ran)
    return out
