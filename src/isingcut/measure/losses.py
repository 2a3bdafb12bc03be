"""Measured loss of states: KL to the original model and NLL, in nats per token.

Two states that agree on the first blocks share the hidden states up to where they part (`tree`).
The original model is the empty state, so that every measurement brings its own reference. Work
goes by pieces, a micro-batch and some of the states, and a finished piece is written to a journal.
In memory the tree is walked branch by branch, which keeps few streams; where blocks are read from
disk, block by block, for as many micro-batches and states at a time as fit the memory allowed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from isingcut.console.progress import Bar, Progress, silent
from isingcut.data.tokens import TokenSet
from isingcut.errors import InputError
from isingcut.files.writing import without_infinities
from isingcut.ising.states import Floats, States
from isingcut.measure.pace import Pace
from isingcut.measure.pieces import Piece, cut, left
from isingcut.measure.sharing import SharedJournal
from isingcut.measure.splitting import split_to_fit
from isingcut.measure.streams import check_finite
from isingcut.measure.tree import in_order, own_blocks, walk
from isingcut.measure.work import identity
from isingcut.models.compute.attention import chosen_attention
from isingcut.models.compute.head import Comparison, OutputHead, Reference, comparison
from isingcut.models.replay import Replay, reuse_freed_memory
from isingcut.options.types import BATCH_TOKENS

__all__ = ["Measurement", "Reference", "measure", "standard_error"]

# Streams of a batch beside those of the states: the original's, what entered the blocks (the
# recording has it), and the one that a block is just making.
_OTHERS = 3
_BY_SAMPLE = ("kl_sums", "nll_sums", "original_nll_sums", "counts")


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

    def of_samples(self, rows: Sequence[int]) -> Measurement:
        """The same on some of the samples; what was computed is still that of all."""
        sums = {name: getattr(self, name)[..., rows] for name in _BY_SAMPLE}
        return replace(self, **sums)

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
    batch_tokens: int = BATCH_TOKENS,
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

    Raises:
        InputError: not even one state of one micro-batch fits the memory allowed.
        ModelError: a loss is not finite.
    """
    wanted = np.asarray(states, dtype=bool).reshape(-1, len(replay))
    n = len(replay)
    order = in_order(wanted)
    ordered = wanted[order]
    nodes = (own_blocks(ordered) if share_prefixes else ~ordered).sum(1)
    per_batch = n + int(nodes.sum())

    def blocks_run(piece: Piece) -> int:
        """Blocks of a piece, as they count in all that a measurement runs."""
        return int(nodes[piece.first : piece.last].sum()) + (0 if piece.first else n)

    reuse_freed_memory()
    batches = tokens.batches(batch_tokens)
    measured = identity(
        replay,
        tokens,
        states=np.packbits(wanted).tolist(),
        shape=list(wanted.shape),
        batch_tokens=batch_tokens,
    )
    kept = SharedJournal(journal, measured, _of_pieces(batches, len(wanted)), replay.processes)
    counts = tokens.predicted.sum(1).numpy().astype(np.int64)
    sums = np.zeros((2, len(wanted) + 1, tokens.samples))
    seen = np.zeros((len(wanted), tokens.samples), dtype=bool)

    def fill(key: str) -> str:
        """Take in what the journal has of a piece; the lowest KL so far, in words."""
        piece, row = Piece.read(key), kept.get(key)
        assert row is not None
        places, found = batches[piece.batch].index.numpy(), order[piece.first : piece.last]
        sums[:, np.append(found, len(wanted))[:, None], places] = row
        if not len(found):
            return ""
        seen[found[:, None], places] = True
        # Samples that a state was not measured on yet count nothing on either side.
        mean = sums[0, :-1].sum(1) / np.maximum(1, seen @ counts)
        return f"lowest KL so far {mean[seen.any(1)].min():.4f}"

    with (
        progress(description, per_batch * len(batches)) as bar,
        torch.inference_mode(),
        chosen_attention(replay),
    ):
        head = OutputHead(replay)
        words = {key: fill(key) for key in kept.keys()}  # noqa: SIM118
        done = sum(blocks_run(Piece.read(key)) for key in words)
        bar.advance(done, next(filter(None, reversed(words.values())), ""))
        size = replay.processes.size
        todo = left(kept.keys(), len(batches), len(order), size, 2 * n / per_batch)
        own, bar = kept.share([piece.key for piece in todo], bar)
        for chunk in _chunks(replay, batches, [Piece.read(key) for key in own]):
            states_of = ordered[chunk[0].first : chunk[0].last]
            mine = [batches[piece.batch] for piece in chunk]
            worth = sum(map(blocks_run, chunk)) / sum(batch.samples for batch in mine)

            def compute(
                some: Sequence[TokenSet], states: States = states_of, worth: float = worth
            ) -> list[Floats]:
                steps = worth * sum(batch.samples for batch in some)
                return _measure(replay, head, some, states, share_prefixes, bar, steps)

            found = split_to_fit(
                replay.limit, mine, compute, lambda a, b: np.concatenate([a, b], -1)
            )
            for piece, rows in zip(chunk, found, strict=True):
                kept.put(piece.key, rows)
                bar.advance(0, fill(piece.key))
        kept.gather()
        for key in kept.keys():  # noqa: SIM118
            fill(key)
    unshared = n + int((~wanted).sum())
    return Measurement(wanted, sums[0, :-1], sums[1, :-1], sums[1, -1], counts, per_batch, unshared)


def _of_pieces(batches: Sequence[TokenSet], states: int) -> Callable[[str, Floats], bool]:
    """Whether a journal's row can be a piece's."""

    def fits(key: str, row: Floats) -> bool:
        piece = Piece.read(key)
        inside = piece.key == key and 0 <= piece.first <= piece.last <= states
        shape = (2, piece.last - piece.first + 1, batches[piece.batch].samples)
        return inside and piece.batch >= 0 and row.shape == shape

    return fits


def _chunks(
    replay: Replay, batches: Sequence[TokenSet], pieces: Sequence[Piece]
) -> Iterator[list[Piece]]:
    """Pieces of the same states that go through each block together, as many as fit."""
    fitting = [part for piece in pieces for part in _fitting(replay, batches[piece.batch], piece)]
    states, pace = operator.attrgetter("first", "last"), Pace(replay.store)
    for (first, last), group in groupby(sorted(fitting, key=states), states):
        alike = list(group)
        mine = [batches[piece.batch] for piece in alike]
        for chunk, _ in pace.chunks(replay, mine, last - first + _OTHERS):
            yield alike[chunk]


def _fitting(replay: Replay, batch: TokenSet, piece: Piece) -> list[Piece]:
    """A piece, in parts whose streams fit the memory allowed.

    Raises:
        InputError: one state does not fit.
    """
    each, room = replay.stream_bytes(batch), replay.room(batch)
    fit = room // each - _OTHERS
    if fit < 1:
        raise InputError(
            f"hidden states may take {room / 1e6:.0f} MB, and one state of "
            f"{batch.input_ids.numel()} tokens takes {(_OTHERS + 1) * each / 1e6:.0f} "
            "MB; raise --memory-limit or lower --batch-tokens"
        )
    return cut(piece, -(-(piece.last - piece.first) // fit))


def _measure(
    replay: Replay,
    head: OutputHead,
    batches: Sequence[TokenSet],
    states: States,
    share_prefixes: bool,
    bar: Bar,
    worth: float,
) -> list[Floats]:
    """For each micro-batch (2, K + 1, B): KL and NLL sums of K sorted states and of the original.

    Args:
        worth: block evaluations that all of it counts on the bar; those that a parted micro-batch
            runs again are no progress.
    """
    recordings = [replay.record(batch.input_ids) for batch in batches]
    originals: list[Comparison] = []
    # Of the sorted states the one that removes nothing comes first: the original.
    tree = np.concatenate([np.zeros((1, len(replay)), dtype=bool), states])
    step = worth / (len(replay) + int((own_blocks(tree) if share_prefixes else ~states).sum()))
    found = [np.zeros((2, len(tree), batch.samples)) for batch in batches]

    def run(block: int, streams: list[Tensor]) -> list[Tensor]:
        bar.advance(step)
        return [r.block(block, s) for r, s in zip(recordings, streams, strict=True)]

    entered = [recording.entered for recording in recordings]
    leaves = walk(tree, entered, run, by_block=replay.streamed, shared=share_prefixes)
    for first, last, ends in leaves:
        if not originals:
            originals = [
                comparison(head, recording, end, batch)
                for recording, end, batch in zip(recordings, ends, batches, strict=True)
            ]
        if last > 1:
            for rows, original, end in zip(found, originals, ends, strict=True):
                rows[:, first:last] = np.array(original.compare(end))[:, None]
    for batch, rows, original in zip(batches, found, originals, strict=True):
        rows[0, 0], rows[1, 0] = 0.0, original.nll
        check_finite(replay, batch, rows, tree)
    # The original came first; it is wanted last.
    return [np.roll(rows, -1, axis=1) for rows in found]
