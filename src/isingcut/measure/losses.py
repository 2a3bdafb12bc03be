"""Measured loss of states: KL to the original model and NLL, in nats per token.

States that agree on their first blocks share the hidden states that entered where they part: they
are sorted by their bits, and each node of the tree of their decisions is computed once. The
original model is the empty state, so that every measurement brings its own reference. Work goes by
pieces, a micro-batch and some of the states, and a finished piece is written to a journal. One
process takes a micro-batch with all its states; where there are fewer micro-batches than processes,
their states are parted as well, and only prefixes shared with states of another piece are run
again. In memory the tree is walked branch by branch, which keeps few streams; where blocks are read
from disk, block by block, for as many pieces at a time as fit the memory allowed, whatever states
and texts they are of. The output head takes one piece after the other: only the original's logits
of one micro-batch exist at a time.
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
from isingcut.files.writing import without_infinities
from isingcut.ising.states import Floats, States
from isingcut.measure.splitting import chunks, split_to_fit
from isingcut.measure.streams import check_finite
from isingcut.measure.work import PLAIN, SharedJournal, Work, identity
from isingcut.models.compute.head import Comparison, OutputHead, comparison
from isingcut.models.replay import Replay, chosen_attention, reuse_freed_memory

T = TypeVar("T")

# Streams of a batch beside those of the states: the original's, what entered the blocks (the
# recording has it), and the one that a block is just making.
_OTHERS = 3
_BY_SAMPLE = ("kl_sums", "nll_sums", "original_nll_sums", "counts")


def in_order(states: States) -> npt.NDArray[np.int64]:
    """The order of the bits of states (S, N), in which neighbours share the longest prefixes."""
    # lexsort's last key is the first to sort by.
    return np.lexsort(states.T[::-1]) if len(states) else np.zeros(0, dtype=np.int64)


def own_blocks(states: States) -> States:
    """(S, N) of sorted states: the blocks that are run for each and not for the one before it.

    The first one shares with the original, whose own N are not counted.
    """
    before = np.concatenate([np.zeros_like(states[:1]), states[:-1]])
    parted = np.logical_or.accumulate(states != before, axis=1)
    return parted & ~states


def tree_nodes(states: States) -> int:
    """Block evaluations per sample that measuring the states (S, N) takes beside the original.

    It is the unit in which every search pays for its states.
    """
    return int(own_blocks(states[in_order(states)]).sum())


def walk(
    trees: Sequence[tuple[States, T]],
    run: Callable[[int, int, T], T],
    *,
    by_block: bool,
) -> Iterator[tuple[int, int, int, T]]:
    """Run the blocks of every state of some trees, each node of a tree once.

    Args:
        trees: of each its states (S, N) bool, sorted, and the stream that enters the first block.
        run: a tree's place, a block's number and the stream before it, to the stream after it.
        by_block: run a block on all branches of all trees before the next one, so that it is
            opened once: as many streams are kept as there are states. Else a branch is followed
            to its end before the next one, and N + 1 streams are kept.

    Yields:
        (tree, first, last, stream): what leaves the blocks of a tree's states first to last - 1,
        which are the same; in order.
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
        """Its name in a journal."""
        return f"{self.batch}:{self.first}-{self.last}"

    @classmethod
    def read(cls, key: str) -> Piece:
        """The piece of that name."""
        batch, _, states = key.partition(":")
        first, _, last = states.partition("-")
        return cls(int(batch), int(first), int(last))


def left(
    done: Iterable[str], batches: int, states: int, processes: int, repeated: float
) -> list[Piece]:
    """What is still to be measured, in pieces that keep all processes busy.

    Args:
        done: names of finished pieces, however they were cut.
        batches, states: all there is.
        processes: how many take pieces.
        repeated: what each further piece of a micro-batch costs in advance, as a share of the
            whole micro-batch.
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
    """Into how many pieces each gap is cut so that all are done soonest."""

    def rounds(parts: int) -> float:
        return -(-gaps * parts // processes) * (1 / parts + repeated)

    return min(range(1, 2 * processes + 1), key=rounds)


def cut(gap: Piece, parts: int) -> list[Piece]:
    """A piece in at most so many parts of like size."""
    count = gap.last - gap.first
    parts = max(1, min(parts, count))
    ends = [gap.first + count * i // parts for i in range(parts + 1)]
    return [Piece(gap.batch, a, b) for a, b in pairwise(ends)]


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
    work: Work = PLAIN,
    description: str = "measuring states",
) -> Measurement:
    """Measure the KL to the original and the NLL of each state.

    Args:
        replay: the model's blocks.
        tokens: m samples.
        states: (S, N) bool.
        work: its journal is left for the caller to remove.

    Complexity: one block evaluation per node of the prefix tree of the states and of the
    empty state, plus one output head per state.

    Raises:
        InputError: not even one state of one micro-batch fits the memory allowed.
        ModelError: a loss is not finite.
    """
    return measure_together(replay, [(tokens, states)], work, description)[0]


def measure_together(
    replay: Replay,
    wanted: Sequence[tuple[TokenSet, States | Sequence[Sequence[int]]]],
    work: Work,
    description: str,
) -> list[Measurement]:
    """`measure` of several sets of states, each on a text of its own, in the same sweeps.

    A journal is one set's: ``work`` has none where there are several.
    """
    reuse_freed_memory()
    tasks = [_Task(replay, tokens, states, work) for tokens, states in wanted]
    with (
        work.progress(description, sum(task.all_blocks for task in tasks)) as bar,
        torch.inference_mode(),
        chosen_attention(replay),
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
    """States to be measured on a text, and what is known of them so far.

    Attributes:
        batches: the text's micro-batches.
        ordered: (S, N) bool, the states in walking order.
        kept: the rows of finished pieces.
        todo: pieces that this process measures.
        all_blocks: block evaluations of all of it.
        bar: progress; a step of this process stands for the others' as well.
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
        self._counts = tokens.predicted.sum(1).numpy().astype(np.int64)
        self._sums = np.zeros((2, len(wanted) + 1, tokens.samples))
        self._seen = np.zeros((len(wanted), tokens.samples), dtype=bool)

    def begin(self, bar: Bar) -> None:
        """Take in what the journal has, and see what is left for this process."""
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
        """A piece, in parts whose streams fit the memory allowed.

        Raises:
            InputError: one state does not fit.
        """
        batch = self.batches[piece.batch]
        each, room = self._replay.stream_bytes(batch), self._replay.room(batch)
        fit = room // each - _OTHERS
        if fit < 1:
            raise InputError(
                f"hidden states may take {room / 1e6:.0f} MB, and one state of "
                f"{batch.input_ids.numel()} tokens takes {(_OTHERS + 1) * each / 1e6:.0f} "
                "MB; raise --memory-limit or lower --batch-tokens"
            )
        return cut(piece, -(-(piece.last - piece.first) // fit))

    def blocks_run(self, piece: Piece) -> int:
        """Blocks of a piece, as they count in all that a measurement runs."""
        n = 0 if piece.first else len(self._replay)
        return n + int(self._nodes[piece.first : piece.last].sum())

    def fill(self, key: str) -> str:
        """Take in what the journal has of a piece; the lowest running mean of KL, in words."""
        piece, row, order = Piece.read(key), self.kept.get(key), self._order
        assert row is not None
        places, found = self.batches[piece.batch].index.numpy(), order[piece.first : piece.last]
        self._sums[:, np.append(found, len(order))[:, None], places] = row
        if not len(found):
            return ""
        self._seen[found[:, None], places] = True
        # Samples that a state was not measured on yet count nothing on either side.
        mean = self._sums[0, :-1].sum(1) / np.maximum(1, self._seen @ self._counts)
        return f"lowest running mean of KL {mean[self._seen.any(1)].min():.4f}"

    def result(self) -> Measurement:
        """What was measured, by other processes, too."""
        self.kept.gather()
        for key in self.kept.keys():  # noqa: SIM118
            self.fill(key)
        wanted, (kl, nll) = self._wanted, self._sums
        unshared = len(self._replay) + int((~wanted).sum())
        return Measurement(
            wanted, kl[:-1], nll[:-1], nll[-1], self._counts, self._per_batch, unshared
        )


def _of_pieces(batches: Sequence[TokenSet], states: int) -> Callable[[str, Floats], bool]:
    """Whether a journal's row can be a piece's."""

    def fits(key: str, row: Floats) -> bool:
        piece = Piece.read(key)
        inside = piece.key == key and 0 <= piece.first <= piece.last <= states
        shape = (2, piece.last - piece.first + 1, batches[piece.batch].samples)
        return inside and piece.batch >= 0 and row.shape == shape

    return fits


@dataclass(frozen=True)
class _Part:
    """A piece on its micro-batch, or on some samples of that."""

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
    """For each part (2, K + 1, B): KL and NLL sums of its K states and of the original.

    Raises:
        ModelError: a loss is not finite.
    """
    batches = [part.batch for part in todo]
    recordings = [replay.record(batch.input_ids) for batch in batches]
    trees, steps = [], []
    for part, recording in zip(todo, recordings, strict=True):
        # Of the sorted states the one that removes nothing comes first: the original.
        task, piece = part.task, part.piece
        own = task.ordered[piece.first : piece.last]
        tree = np.concatenate([np.zeros((1, len(replay)), dtype=bool), own])
        trees.append((tree, recording.entered))
        # What a parted micro-batch runs again is no progress.
        runs = len(replay) + int(own_blocks(tree).sum())
        share = part.samples / task.batches[piece.batch].samples
        steps.append(share * task.blocks_run(piece) / runs)

    def run(tree: int, block: int, stream: Tensor) -> Tensor:
        todo[tree].task.bar.advance(steps[tree])
        return recordings[tree].block(block, stream)

    leaves = walk(trees, run, by_block=replay.streamed)
    for tree, group in groupby(leaves, key=itemgetter(0)):
        rows = np.zeros((2, len(trees[tree][0]), batches[tree].samples))
        originals: list[Comparison] = []
        for _, first, last, end in group:
            if not originals:
                originals = [comparison(head, recordings[tree], end, batches[tree])]
            if last > 1:
                rows[:, first:last] = np.array(originals[0].compare(end))[:, None]
        rows[0, 0], rows[1, 0] = 0.0, originals[0].nll
        check_finite(replay, batches[tree], rows, trees[tree][0])
        # The original came first; it is wanted last.
        yield np.roll(rows, -1, axis=1)
