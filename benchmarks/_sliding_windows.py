"""`sliding-window-merging`: merge runs of neighbouring blocks, from the last block to the first.

A window starts at the last block and takes in the block below it as long as the model with the
window merged still ends in hidden states like the original's: their cosine similarity must reach a
threshold. Where it does not, the window is closed, its blocks are merged into its first one by
adding parameter differences, and a new window starts at the block that did not fit. So a threshold
gives a number of blocks that vanish; here it is searched for the number asked for.

Source: Ding et al., arXiv 2502.19159, without the LoRA retraining that follows there. Ours
differs from the paper, or decides what its summary leaves open: the threshold is searched, where
the paper sets it by hand for a ratio; the similarity is the mean over tokens of the cosine of the
final hidden states (those the output head sees), on the first `samples` samples; every parameter
of a block takes part, norms included; where no threshold leaves exactly M blocks fewer, the
highest that removes more is taken and merging stops at M; `keep_ends` is ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from _merging import Merged, check_mergeable
from isingcut.baselines import registry
from isingcut.baselines.base import Outcome, check_count
from isingcut.console.progress import Bar
from isingcut.data.calibration import TokenSet
from isingcut.errors import ArchitectureError, InputError
from isingcut.measure.ledger import Ledger
from isingcut.measure.work import Work
from isingcut.models.compute.head import OutputHead
from isingcut.models.replay import Replay

NAME = "sliding-window-merging"
Groups = tuple[tuple[int, ...], ...]
FIRST = 0.9
"""The threshold tried first, where the search starts."""


@dataclass(frozen=True)
class MergedOutcome(Outcome):
    """What a merging baseline made of the model.

    Attributes:
        merges: groups of blocks whose parameter differences are added into the first of the
            group; the others of a group are in ``removed``.
    """

    merges: Groups = ()


@dataclass(frozen=True)
class SlidingWindowMerging:
    """Sliding-window merging with its threshold searched.

    Attributes:
        samples: how many samples the similarity is measured on, a few, from the first one on.
        keep_ends: leave the first and the last block alone.
    """

    samples: int = 10
    keep_ends: bool = False

    def choose(
        self, replay: Replay, tokens: TokenSet, remove: int, work: Work, seed: int
    ) -> MergedOutcome:
        """The merges that leave ``remove`` blocks fewer; ``seed`` has no effect.

        Raises:
            InputError: impossible number of removals, or fewer than one sample.
            ArchitectureError: neighbouring blocks have other parameters, or the model's final
                hidden states cannot be found.

        Complexity: up to N - 1 merged models per threshold, each run from its first merged
            block on. The samples' hidden states at all N boundaries stay in memory.
        """
        check_count(replay, remove, kept=3 if self.keep_ends else 0)
        if self.samples < 1:
            raise InputError(f"samples must be at least 1, got {self.samples}")
        check_mergeable(replay)
        if replay.model.get_output_embeddings() is None:  # type: ignore[operator]
            raise ArchitectureError(
                f"{type(replay.model).__name__} names no output head, so that its final hidden "
                "states cannot be compared; use a baseline that removes blocks"
            )
        looked_at = tokens.select(range(min(self.samples, tokens.samples)))
        share = int(looked_at.mask.sum()) / int(tokens.mask.sum())
        trials = _Trials(replay, looked_at, work)
        ends = 1 if self.keep_ends else 0
        blocks = range(ends, len(replay) - ends)
        low, high = -np.inf, np.inf
        threshold: float | None = FIRST
        groups: Groups = ()
        exact, tried, alone = False, 0, 0.0
        while threshold is not None and not exact:
            tried += 1
            trials.asked = 0
            with work.progress(f"merging at similarity {threshold:.4f}", len(blocks) - 1) as bar:
                found, exact = _scan(blocks, remove, threshold, trials, bar)
            if found is None:
                high = threshold
            else:
                low, groups = threshold, found
                alone = (1 + trials.asked / len(replay)) * share
            threshold = _between(low, high, trials.known.values())
        info = {
            "threshold": float(low),
            "exact": exact,
            "similarity": trials.known[groups],
            "merges": [list(group) for group in groups],
            "thresholds_tried": tried,
            "evaluations": len(trials.known),
            "passes_if_threshold_known": alone,
        }
        removed = sorted(i for group in groups for i in group[1:])
        passes = trials.ledger.passes * share
        return MergedOutcome(tuple(removed), passes, 0.0, info, groups)


registry.register(NAME, SlidingWindowMerging)


def _scan(
    blocks: range, remove: int, threshold: float, trials: _Trials, bar: Bar
) -> tuple[Groups | None, bool]:
    """Slide the window down over consecutive blocks at one threshold.

    Returns:
        The groups that leave ``remove`` blocks fewer, or None where the threshold merges too
        few; and whether it merges exactly so many.
    """
    closed: Groups = ()
    window: tuple[int, ...] = (blocks[-1],)
    merged = 0
    for block in reversed(blocks[:-1]):
        wider = (block, *window)
        if trials.similarity((*closed, wider)) >= threshold:
            if merged == remove:
                return _groups(closed, window), False
            merged += 1
            window = wider
        else:
            closed, window = _groups(closed, window), (block,)
            if merged + block - blocks[0] < remove:
                return None, False
        bar.advance(1)
    return _groups(closed, window), True


def _groups(closed: Groups, window: tuple[int, ...]) -> Groups:
    """The closed groups and the window, where it holds more than its first block."""
    return (*closed, window) if len(window) > 1 else closed


def _between(low: float, high: float, values: Iterable[float]) -> float | None:
    """The median of the values strictly between two thresholds; None where there is none.

    A scan depends on the threshold only through comparisons with similarities that it meets, so
    that no other threshold has to be tried.
    """
    inside = sorted({v for v in values if low < v < high})
    return inside[len(inside) // 2] if inside else None


class _Trials:
    """Similarities of merged models, each measured and paid for once.

    Attributes:
        known: mean cosine of the final hidden states with the original's, by groups.
        ledger: what was paid: the original's blocks, then of each merged model those from its
            first merged block on.
        asked: the same of all that was asked for, known or not; for the caller to reset.
    """

    def __init__(self, replay: Replay, tokens: TokenSet, work: Work) -> None:
        self._replay, self._tokens, self._work = replay, tokens, work
        self.ledger = Ledger(replay, tokens, work)
        self.ledger.pay("original", len(replay), 0.0)
        self._head = OutputHead(replay)
        self._originals: list[_Original] = []
        self.known: dict[Groups, float] = {}
        self.asked = 0

    def similarity(self, groups: Groups) -> float:
        """Mean over all tokens of the cosine with the original, -1 to 1."""
        kept = len(self._replay) - groups[-1][0] - sum(len(group) - 1 for group in groups)
        self.asked += kept
        if groups not in self.known:
            key = f"merged:{groups}"
            row = self.ledger.once(key, 1, kept, 0.0, lambda: np.array([self._measure(groups)]))
            self.known[groups] = float(row[0])
        return self.known[groups]

    def _measure(self, groups: Groups) -> float:
        if not self._originals:
            batches = self._tokens.batches(self._work.batch_tokens)
            self._originals = [_Original(self._replay, self._head, batch) for batch in batches]
        merged = Merged(self._replay, groups)
        start = groups[-1][0]
        kept = [i for i in range(start, len(self._replay)) if not merged.removed[i]]
        total = 0.0
        with torch.inference_mode():
            for original in self._originals:
                stream = original.streams[start]
                with merged:
                    for i in kept:
                        stream = original.recording.block(i, stream)
                final = self._head.inputs(stream, original.recording.input_ids)[original.real]
                cosine = nn.functional.cosine_similarity(final.float(), original.final.float(), -1)
                total += float(cosine.sum(dtype=torch.float64))
        return total / int(self._tokens.mask.sum())


class _Original:
    """What the original model does with one batch, kept for all merged models to start from."""

    def __init__(self, replay: Replay, head: OutputHead, batch: TokenSet) -> None:
        with torch.inference_mode():
            self.recording = replay.record(batch.input_ids)
            self.real = batch.mask.to(replay.device)
            self.streams = [self.recording.entered]
            for i in range(len(replay)):
                self.streams.append(self.recording.block(i, self.streams[i]))
            self.final = head.inputs(self.streams.pop(), self.recording.input_ids)[self.real]
