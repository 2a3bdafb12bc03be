"""Measured losses of states: KL to the original model and NLL, in nats per token.

States that agree on their first blocks share hidden states up to the first block where they differ.
They are sorted by their bits, and each node of their prefix tree is computed once. The original
model is the state that removes nothing, so that every measurement includes its own reference.

Work is divided into pieces, a micro-batch with some of the states, and a finished piece is written
to a journal. One process takes a micro-batch with all its states. With fewer micro-batches than
processes, the states are divided too, and only prefixes shared with states of another piece are run
again. A model in memory runs branch by branch, which keeps few hidden states. A streamed model runs
block by block, for as many pieces at a time as fit the memory limit. The output head processes one
piece at a time, so that the original's logits exist for one micro-batch only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from operator import itemgetter
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from isingcut.console.progress import Bar
from isingcut.data.tokens import TokenSet
from isingcut.errors import InputError
from isingcut.files.results import without_infinities
from isingcut.ising.states import Floats, States
from isingcut.measure.splitting import chunks, split_to_fit
from isingcut.measure.streams import check_finite
from isingcut.measure.work import PLAIN, SharedJournal, Work, identity
from isingcut.models.compute.head import Comparison, OutputHead
from isingcut.models.replay import Replay, use_attention

T = TypeVar("T")

# Hidden-state tensors of a batch besides those of the states: that of the original, the input of
# the blocks (in the recording), and the output of the running block.
_OTHERS = 3
_BY_SAMPLE = ("kl_sums", "nll_sums", "original_nll_sums", "counts")


def in_order(states: States) -> npt.NDArray[np.int64]:
    """Return indices that sort states (S, N) by bits; neighbours then share longest prefixes."""
    # lexsort sorts by its last key first.
    return np.lexsort(states.T[::-1]) if len(states) else np.zeros(0, dtype=np.int64)


def own_blocks(states: States) -> States:
    """Return (S, N): the blocks that each sorted state runs and does not share with the one before.

    The first state shares blocks with the original, whose own N blocks are not counted.
    """
    before = np.concatenate([np.zeros_like(states[:1]), states[:-1]])
    parted = np.logical_or.accumulate(states != before, axis=1)
    return parted & ~states


def tree_nodes(states: States) -> int:
    """Return the number of block evaluations per sample to measure states, without the original.

    Searches count the cost of their states (S, N) in this unit.
    """
    return int(own_blocks(states[in_order(states)]).sum())


def walk(
    trees: Sequence[tuple[States, T]],
    run: Callable[[int, int, T], T],
    *,
    by_block: bool,
) -> Iterator[tuple[int, int, int, T]]:
    """Run the blocks of every state of some prefix trees, each node of a tree once.

    Args:
        trees: for each tree its sorted states (S, N) bool, and the input of the first block.
        run: function from a tree's index, a block's number and the block's input to its output.
        by_block: run a block on all branches of all trees before the next block, so that it is
            loaded once; keeps one hidden-state tensor per state. Otherwise follow one branch to
            its end at a time; keeps N + 1 hidden-state tensors.

    Yields:
        (tree, first, last, output): the output of the last block for a tree's states first to
        last - 1, which are equal; in order.
    """
    roots = [(tree, 0, len(states), entered) for tree, (states, entered) in enumerate(trees)]
    waiting = [(0, deque(roots))] if by_block else [(0, deque([root])) for root in reversed(roots)]
    while waiting:
        depth, branches = waiting.pop()
        grown: deque[tuple[int, int, int, T]] = deque()
        while branches:
            tree, first, last, stream = branches.popleft()
            states = trees[tree][0]
            if depth == states.shape[1]:
                yield tree, first, last, stream
                continue
            middle = first + int((~states[first:last, depth]).sum())
            if first < middle:
                grown.append((tree, first, middle, run(tree, depth, stream)))
            if middle < last:
                grown.append((tree, middle, last, stream))
        if by_block and grown:
            waiting.append((depth + 1, grown))
        else:
            waiting += [(depth + 1, deque([branch])) for branch in reversed(grown)]


@dataclass(frozen=True)
class Piece:
    """States first, first + 1, ..., last - 1 of the walk, on one micro-batch."""

    batch: int
    first: int
    last: int

    @property
    def key(self) -> str:
        """The key of the piece in a journal."""
        return f"{self.batch}:{self.first}-{self.last}"

    @classmethod
    def read(cls, key: str) -> Piece:
        """Parse the key of a piece."""
        batch, _, states = key.partition(":")
        first, _, last = states.partition("-")
        return cls(int(batch), int(first), int(last))


def left(
    done: Iterable[str], batches: int, states: int, processes: int, repeated: float
) -> list[Piece]:
    """Divide the remaining measurement into pieces that keep all processes busy.

    Args:
        done: keys of finished pieces, of any size.
        batches, states: total numbers of micro-batches and states.
        processes: number of processes.
        repeated: extra cost of each further piece of a micro-batch, relative to the whole
            micro-batch.
    """
    finished: dict[int, list[Piece]] = {}
    for piece in map(Piece.read, done):
        finished.setdefault(piece.batch, []).append(piece)
    gaps: list[Piece] = []
    for batch in range(batches):
        end = 0
        had = sorted(finished.get(batch, []), key=lambda p: p.first)
        for piece in had:
            if piece.first > end:
                gaps.append(Piece(batch, end, piece.first))
            end = max(end, piece.last)
        if end < states or not had:
            gaps.append(Piece(batch, end, states))
    parts = _parts(len(gaps), processes, repeated)
    return [part for gap in gaps for part in cut(gap, parts)]


def _parts(gaps: int, processes: int, repeated: float) -> int:
    """Return the number of pieces per gap with which the measurement finishes soonest."""

    def rounds(parts: int) -> float:
        return -(-gaps * parts // processes) * (1 / parts + repeated)

    return min(range(1, 2 * processes + 1), key=rounds)


def cut(gap: Piece, parts: int) -> list[Piece]:
    """Divide a piece into at most ``parts`` parts of similar size."""
    count = gap.last - gap.first
    parts = max(1, min(parts, count))
    ends = [gap.first + count * i // parts for i in range(parts + 1)]
    return [Piece(gap.batch, a, b) for a, b in pairwise(ends)]


@dataclass(frozen=True, eq=False)
class Measurement:
    """The losses of S states on m samples.

    Attributes:
        states: (S, N) bool, True where a block is removed.
        kl_sums: (S, m) KL(original || state), summed over a sample's tokens, nats.
        nll_sums: (S, m) negative log-likelihood, summed over a sample's tokens, nats.
        original_nll_sums: (m,) the same as ``nll_sums`` for the original model.
        counts: (m,) predicted, non-padding tokens of each sample.
        blocks_run: number of block evaluations per sample of the token set.
        blocks_unshared: number of block evaluations without shared prefixes.
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
        """The mean KL per token (S,)."""
        return np.asarray(self.kl_sums.sum(1) / self.counts.sum())

    @property
    def nll(self) -> Floats:
        """The mean NLL per token (S,)."""
        return np.asarray(self.nll_sums.sum(1) / self.counts.sum())

    @property
    def kl_se(self) -> Floats:
        """The standard error (S,) of `kl` over samples (ratio estimator)."""
        return standard_error(self.kl_sums, self.counts)

    @property
    def nll_se(self) -> Floats:
        """The standard error (S,) of `nll` over samples (ratio estimator)."""
        return standard_error(self.nll_sums, self.counts)

    def of_samples(self, rows: Sequence[int]) -> Measurement:
        """Return the measurement on some samples; the block counts are still those of all."""
        sums = {name: getattr(self, name)[..., rows] for name in _BY_SAMPLE}
        return replace(self, **sums)

    def losses(self, state: int) -> dict[str, Any]:
        """Return KL and NLL of one state with standard errors (or None), as in results files."""
        return {
            "kl": float(self.kl[state]),
            "kl_se": without_infinities(float(self.kl_se[state])),
            "nll": float(self.nll[state]),
            "nll_se": without_infinities(float(self.nll_se[state])),
        }


def standard_error(sums: Floats, counts: npt.NDArray[np.int64]) -> Floats:
    """Compute the standard error of sum(sums) / sum(counts) over samples, by linearisation.

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
    work: Work = PLAIN,
    description: str = "measuring states",
) -> Measurement:
    """Measure the KL to the original and the NLL of each state.

    Args:
        replay: the model's blocks.
        tokens: m samples.
        states: (S, N) bool.
        work: settings of the measurement; the caller deletes its journal.

    Complexity: one block evaluation per node of the prefix tree of the states and of the
    empty state, plus one output head per state.

    Raises:
        InputError: not even one state of one micro-batch fits the memory limit.
        ModelError: a loss is not finite.
    """
    return measure_together(replay, [(tokens, states)], work, description)[0]


def measure_together(
    replay: Replay,
    wanted: Sequence[tuple[TokenSet, States | Sequence[Sequence[int]]]],
    work: Work,
    description: str,
) -> list[Measurement]:
    """Measure several sets of states, each on its own text, in the same sweeps; see `measure`.

    A journal belongs to one set, so with several sets ``work`` must have none.
    """
    tasks = [_Task(replay, tokens, states, work) for tokens, states in wanted]
    with (
        work.progress(description, sum(task.all_blocks for task in tasks)) as bar,
        torch.inference_mode(),
        use_attention(replay),
    ):
        head = OutputHead(replay)
        for task in tasks:
            task.begin(bar)
        todo = [
            _Part(task, piece, task.batches[piece.batch]) for task in tasks for piece in task.todo
        ]
        streams = [part.piece.last - part.piece.first + _OTHERS for part in todo]

        def compute(some: Sequence[_Part]) -> list[Floats]:
            return list(_measure(replay, head, some))

        for chunk, _ in chunks(replay, [part.batch for part in todo], streams):
            found = split_to_fit(
                replay.limit, todo[chunk], compute, lambda a, b: np.concatenate([a, b], -1)
            )
            for part, rows in zip(todo[chunk], found, strict=True):
                part.task.kept.put(part.piece.key, rows)
                bar.advance(0, part.task.fill(part.piece.key))
        return [task.result() for task in tasks]


class _Task:
    """States to measure on a text, and their results so far.

    Attributes:
        batches: micro-batches of the text.
        ordered: (S, N) bool, sorted states.
        kept: journal with the rows of finished pieces.
        todo: pieces that this process measures.
        all_blocks: number of block evaluations of the whole measurement.
        bar: progress bar; a step of this process counts for all processes.
    """

    def __init__(
        self,
        replay: Replay,
        tokens: TokenSet,
        states: States | Sequence[Sequence[int]],
        work: Work,
    ) -> None:
        self._replay = replay
        self._wanted = wanted = np.asarray(states, dtype=bool).reshape(-1, len(replay))
        self._order = in_order(wanted)
        self.ordered = wanted[self._order]
        self._nodes = own_blocks(self.ordered).sum(1)
        self._per_batch = len(replay) + int(self._nodes.sum())
        self.batches = tokens.batches(work.batch_tokens)
        self.all_blocks = self._per_batch * len(self.batches)
        measured = identity(
            replay,
            tokens,
            states=np.packbits(wanted).tolist(),
            shape=list(wanted.shape),
            batch_tokens=work.batch_tokens,
        )
        fits = _of_pieces(self.batches, len(wanted))
        self.kept = SharedJournal(work.journal, measured, fits, replay.processes)
        self._counts = tokens.counts
        self._sums = np.zeros((2, len(wanted) + 1, tokens.samples))
        self._seen = np.zeros((len(wanted), tokens.samples), dtype=bool)

    def begin(self, bar: Bar) -> None:
        """Read the journal, and collect the remaining pieces of this process."""
        n, keys = len(self._replay), list(self.kept.keys())
        words = [self.fill(key) for key in keys]
        done = sum(self.blocks_run(Piece.read(key)) for key in keys)
        bar.advance(done, next(filter(None, reversed(words)), ""))
        size, again = self._replay.processes.size, 2 * n / self._per_batch
        todo = left(keys, len(self.batches), len(self._order), size, again)
        own, self.bar = self.kept.share([piece.key for piece in todo], bar)
        pieces = sorted(map(Piece.read, own), key=lambda piece: (piece.first, piece.last))
        self.todo = [part for piece in pieces for part in self._fitting(piece)]

    def _fitting(self, piece: Piece) -> list[Piece]:
        """Divide a piece into parts whose hidden states fit the memory limit.

        Raises:
            InputError: one state does not fit.
        """
        batch = self.batches[piece.batch]
        each, room = self._replay.stream_bytes(batch), self._replay.room(batch)
        fit = room // each - _OTHERS
        if fit < 1:
            raise InputError(
                f"hidden states may take {room / 1e6:.0f} MB, but one state of "
                f"{batch.input_ids.numel()} tokens takes {(_OTHERS + 1) * each / 1e6:.0f} "
                "MB; raise --memory-limit or lower --batch-tokens"
            )
        return cut(piece, -(-(piece.last - piece.first) // fit))

    def blocks_run(self, piece: Piece) -> int:
        """Return the number of block evaluations of a piece."""
        n = 0 if piece.first else len(self._replay)
        return n + int(self._nodes[piece.first : piece.last].sum())

    def fill(self, key: str) -> str:
        """Read a piece from the journal; return the lowest running mean of KL as text."""
        piece, row, order = Piece.read(key), self.kept.get(key), self._order
        assert row is not None
        places, found = self.batches[piece.batch].index.numpy(), order[piece.first : piece.last]
        self._sums[:, np.append(found, len(order))[:, None], places] = row
        if not len(found):
            return ""
        self._seen[found[:, None], places] = True
        # Unmeasured samples of a state are in neither sum.
        mean = self._sums[0, :-1].sum(1) / np.maximum(1, self._seen @ self._counts)
        return f"lowest running mean of KL {mean[self._seen.any(1)].min():.4f}"

    def result(self) -> Measurement:
        """Return the measurement, with the rows of all processes."""
        self.kept.gather()
        for key in self.kept.keys():  # noqa: SIM118
            self.fill(key)
        wanted, (kl, nll) = self._wanted, self._sums
        unshared = len(self._replay) + int((~wanted).sum())
        return Measurement(
            wanted, kl[:-1], nll[:-1], nll[-1], self._counts, self._per_batch, unshared
        )


def _of_pieces(batches: Sequence[TokenSet], states: int) -> Callable[[str, Floats], bool]:
    """Return a function that checks whether a journal's row can belong to a piece."""

    def fits(key: str, row: Floats) -> bool:
        piece = Piece.read(key)
        inside = piece.key == key and 0 <= piece.first <= piece.last <= states
        shape = (2, piece.last - piece.first + 1, batches[piece.batch].samples)
        return inside and piece.batch >= 0 and row.shape == shape

    return fits


@dataclass(frozen=True)
class _Part:
    """A piece on its micro-batch, or on some of the samples."""

    task: _Task
    piece: Piece
    batch: TokenSet

    @property
    def samples(self) -> int:
        return self.batch.samples

    @property
    def positions(self) -> int:
        return self.batch.positions

    def halves(self) -> tuple[_Part, _Part]:
        first, second = self.batch.halves()
        return replace(self, batch=first), replace(self, batch=second)


def _measure(replay: Replay, head: OutputHead, todo: Sequence[_Part]) -> Iterator[Floats]:
    """Yield for each part (2, K + 1, B): KL and NLL sums of its K states and of the original.

    Raises:
        ModelError: a loss is not finite.
    """
    batches = [part.batch for part in todo]
    recordings = [replay.record(batch.input_ids) for batch in batches]
    trees, steps = [], []
    for part, recording in zip(todo, recordings, strict=True):
        # The first sorted state removes nothing: the original.
        task, piece = part.task, part.piece
        own = task.ordered[piece.first : piece.last]
        tree = np.concatenate([np.zeros((1, len(replay)), dtype=bool), own])
        trees.append((tree, recording.entered))
        # Repeated blocks of a divided micro-batch do not count as progress.
        runs = len(replay) + int(own_blocks(tree).sum())
        share = part.samples / task.batches[piece.batch].samples
        steps.append(share * task.blocks_run(piece) / runs)

    def run(tree: int, block: int, stream: Tensor) -> Tensor:
        todo[tree].task.bar.advance(steps[tree])
        return recordings[tree].block(block, stream)

    leaves = walk(trees, run, by_block=replay.streamed)
    for tree, group in groupby(leaves, key=itemgetter(0)):
        original: Comparison | None = None
        found, lengths = list[Tensor](), list[int]()
        for _, first, last, end in group:
            if original is None:
                original = Comparison(head, recordings[tree], end, batches[tree])
                found, lengths = [original.own], [1]
                first += 1
            if first < last:
                found.append(original.compare(end))
                lengths.append(last - first)
        assert original is not None
        # Before this line, nothing is read from the device.
        rows = np.repeat(original.sum_samples(found), lengths, axis=1)
        check_finite(replay, batches[tree], rows, trees[tree][0])
        # Move the original from the first place to the last.
        yield np.roll(rows, -1, axis=1)
