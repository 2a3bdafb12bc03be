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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
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
    return np.lexsort(states.T[::-1])


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
    waiting = deque(
        (0, tree, 0, len(states), entered)
        for tree, (states, entered) in enumerate(trees)
    )
    while waiting:
        depth, tree, first, last, stream = waiting.popleft()
        states = trees[tree][0]
        if depth == states.shape[1]:
            yield tree, first, last, stream
            continue
        middle = first + int((~states[first:last, depth]).sum())
        grown = []
        if first < middle:
            grown.append((depth + 1, tree, first, middle, run(tree, depth, stream)))
        if middle < last:
            grown.append((depth + 1, tree, middle, last, stream))
        if by_block:
            waiting.extend(grown)
        else:
            waiting.extendleft(reversed(grown))


@dataclass(frozen=True)
class Piece:
    """Some states of a task on one micro-batch, or on some of its samples.

    Attributes:
        tokens: the samples.
        batch: index of the micro-batch.
        places: places of the states in the walk, ascending; place 0 is the original model.
    """

    task: _Task
    tokens: TokenSet
    batch: int
    places: Sequence[int]

    @property
    def samples(self) -> int:
        """Number of samples."""
        return self.tokens.samples

    @property
    def positions(self) -> int:
        """Number of positions, padding included."""
        return self.tokens.positions

    def halves(self) -> tuple[Piece, Piece]:
        """Divide the samples into two halves."""
        first, second = self.tokens.halves()
        return replace(self, tokens=first), replace(self, tokens=second)

    def cut(self, parts: int) -> list[Piece]:
        """Divide the states into at most ``parts`` parts of similar size."""
        count = len(self.places)
        parts = min(parts, count)
        ends = [count * i // parts for i in range(parts + 1)]
        return [replace(self, places=self.places[a:b]) for a, b in pairwise(ends)]


def divide(pieces: Sequence[Piece], processes: int, repeated: float) -> list[Piece]:
    """Divide pieces so that all processes are busy and the measurement finishes soonest.

    Args:
        repeated: extra cost of each further part of a piece, relative to the whole piece.
    """

    def rounds(parts: int) -> float:
        return -(-len(pieces) * parts // processes) * (1 / parts + repeated)

    parts = min(range(1, 2 * processes + 1), key=rounds)
    return [part for piece in pieces for part in piece.cut(parts)]


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
    """

    states: States
    kl_sums: Floats
    nll_sums: Floats
    original_nll_sums: Floats
    counts: npt.NDArray[np.int64]
    blocks_run: int

    @property
    def kl(self) -> Floats:
        """The mean KL per token (S,)."""
        return np.asarray(self.kl_sums.sum(1) / self.counts.sum())

    @property
    def nll(self) -> Floats:
        """The mean NLL per token (S,)."""
        return np.asarray(self.nll_sums.sum(1) / self.counts.sum())

    def of_samples(self, rows: Sequence[int]) -> Measurement:
        """Return the measurement on some samples; the block counts are still those of all."""
        sums = {name: getattr(self, name)[..., rows] for name in _BY_SAMPLE}
        return replace(self, **sums)

    def losses(self, state: int) -> dict[str, Any]:
        """Return KL and NLL of one state with standard errors (or None), as in results files."""
        errors = [
            without_infinities(float(standard_error(sums[state], self.counts)))
            for sums in (self.kl_sums, self.nll_sums)
        ]
        return {
            "kl": float(self.kl[state]),
            "kl_se": errors[0],
            "nll": float(self.nll[state]),
            "nll_se": errors[1],
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


def difference(
    first: npt.ArrayLike, second: npt.ArrayLike, counts: npt.NDArray[np.int64]
) -> tuple[float, float]:
    """Return second - first in nats per prediction, paired by sample, and its standard error.

    Args:
        first, second: sums over the predictions of each sample.
        counts: number of predictions of each sample.
    """
    sums: Floats = np.asarray(second, dtype=float) - np.asarray(first, dtype=float)
    return float(sums.sum() / counts.sum()), float(standard_error(sums, counts))


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
        todo = [piece for task in tasks for piece in task.todo]
        streams = [len(piece.places) + _OTHERS for piece in todo]
        for chunk, _ in chunks(replay, [piece.tokens for piece in todo], streams):
            losses = split_to_fit(
                replay.limit,
                todo[chunk],
                partial(_measure, replay, head),
                lambda a, b: np.concatenate([a, b], -1),
            )
            for piece, rows in zip(todo[chunk], losses, strict=True):
                keys = (f"{piece.batch}:{place}" for place in piece.places)
                by_state = rows.swapaxes(0, 1)
                piece.task.kept.put(dict(zip(keys, by_state, strict=True)))
        return [task.result() for task in tasks]


class _Task:
    """States to measure on a text, and their results so far.

    Attributes:
        batches: micro-batches of the text.
        ordered: (S + 1, N) bool, the original model and the sorted states.
        kept: journal with a row (2, B) for each finished state on each micro-batch.
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
        self.ordered = np.insert(wanted[self._order], 0, False, axis=0)
        self._nodes = own_blocks(self.ordered).sum(1)
        self._nodes[0] = len(replay)
        self.batches = tokens.batches(work.batch_tokens)
        self.all_blocks = int(self._nodes.sum()) * len(self.batches)
        measured = identity(
            replay,
            tokens,
            states=np.packbits(wanted).tolist(),
            shape=list(wanted.shape),
            batch_tokens=work.batch_tokens,
        )
        self.kept = SharedJournal(work.journal, measured, replay.processes)
        self._counts = tokens.counts

    def begin(self, bar: Bar) -> None:
        """Read the journal, and collect the remaining pieces of this process, each with as many
        states as fit the memory limit.

        Raises:
            InputError: one state does not fit.
        """
        left = []
        for b, tokens in enumerate(self.batches):
            missing = [place for place, row in enumerate(self._rows(b)) if row is None]
            if missing:
                left.append(Piece(self, tokens, b, missing))
        bar.advance(self.all_blocks - sum(map(self.blocks_run, left)))
        again = 2 * len(self._replay) / int(self._nodes.sum())
        pieces = divide(left, self._replay.processes.size, again)
        own, self.bar = self.kept.share(pieces, bar)
        self.todo = []
        for piece in sorted(own, key=lambda piece: piece.places[0]):
            each = self._replay.stream_bytes(piece.tokens)
            room = self._replay.room(piece.tokens)
            fit = room // each - _OTHERS
            if fit < 1:
                raise InputError(
                    f"hidden states may take {room / 1e6:.0f} MB, but one state of "
                    f"{piece.positions} tokens takes {(_OTHERS + 1) * each / 1e6:.0f} "
                    "MB; raise --memory-limit or lower --batch-tokens"
                )
            self.todo += piece.cut(-(-len(piece.places) // fit))

    def _rows(self, batch: int) -> list[Any]:
        """Return the row (2, B) of each state on a micro-batch, or None if it is missing."""
        return [self.kept.get(f"{batch}:{k}") for k in range(len(self.ordered))]

    def blocks_run(self, piece: Piece) -> int:
        """Return the number of block evaluations of a piece."""
        return int(self._nodes[piece.places].sum())

    def result(self) -> Measurement:
        """Return the measurement, with the rows of all processes."""
        self.kept.gather()
        sums = np.zeros((2, len(self.ordered), len(self._counts)))
        for b, tokens in enumerate(self.batches):
            sums[:, :, tokens.index.numpy()] = np.stack(self._rows(b), 1)
        kl, nll = sums[:, 1 + np.argsort(self._order)]
        run = int(self._nodes.sum())
        return Measurement(self._wanted, kl, nll, sums[1, 0], self._counts, run)


def _measure(replay: Replay, head: OutputHead, todo: Sequence[Piece]) -> list[Floats]:
    """Return for each piece (2, K, B): KL and NLL sums of its K states.

    Raises:
        ModelError: a loss is not finite.
    """
    recordings = [replay.record(piece.tokens.input_ids) for piece in todo]
    trees = []
    steps = []
    for piece, recording in zip(todo, recordings, strict=True):
        task = piece.task
        # The states of every piece are compared with the original.
        tree = task.ordered[[0, *filter(None, piece.places)]]
        trees.append((tree, recording.entered))
        # Repeated blocks of a divided micro-batch do not count as progress.
        runs = len(replay) + int(own_blocks(tree).sum())
        share = piece.samples / task.batches[piece.batch].samples
        steps.append(share * task.blocks_run(piece) / runs)

    def run(tree: int, block: int, stream: Tensor) -> Tensor:
        todo[tree].task.bar.advance(steps[tree])
        return recordings[tree].block(block, stream)

    sums = []
    leaves = walk(trees, run, by_block=replay.streamed)
    for tree, group in groupby(leaves, key=itemgetter(0)):
        batch = todo[tree].tokens
        losses = []
        lengths = []
        for _, first, last, end in group:
            logits = head.logits(recordings[tree], end, batch)
            if first == 0:
                original = Comparison(logits, batch)
            losses.append(original.compare(logits) if first else original.own)
            lengths.append(last - first)
        # Before this line, nothing is read from the device.
        rows = np.repeat(original.sum_samples(losses), lengths, axis=1)
        del original
        check_finite(replay, batch, rows, trees[tree][0])
        sums.append(rows[:, -len(todo[tree].places) :])
    return sums
