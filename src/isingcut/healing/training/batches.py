"""Which samples are computed together: an optimiser step's in parts of like length.

A step takes its samples in a shuffled order. They are sorted by length,
dealt to the processes, and cut into micro-batches so that little padding is computed: what a step
learns is the same in any order and in any parts. Every step has as many micro-batches as every
other, in every process, as gradient accumulation and sharded models ask for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from isingcut.data.tokens import TokenSet

# A further micro-batch casts the weights and adds up their gradients once more: about as much work
# as so many tokens.
_EACH = 64
# Steps whose padding is looked at, and micro-batches more than needed that are thought of.
_LOOKED_AT, _MORE = 8, 16


@dataclass(frozen=True)
class Steps(Sampler[list[int]]):
    """The micro-batches of a training, one after the other, as a batch sampler.

    Args:
        lengths: tokens of each sample.
        batch: samples of an optimiser step, over all processes.
        steps: optimiser steps.
        rank, size: of this process, of how many.
        seed: of the order.
        most: tokens of a micro-batch, padding included; one sample may have more.
        micro_batches: of a step, in each process.
    """

    lengths: Sequence[int]
    batch: int
    steps: int
    rank: int
    size: int
    seed: int
    most: int
    micro_batches: int = 1

    def __len__(self) -> int:
        return self.steps * self.micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.steps):
            mine = self._of(step)[self.rank :: self.size]
            lengths = [self.lengths[i] for i in mine]
            *_, (_, found) = divisions(lengths, self.micro_batches, self.most)
            for part in found:
                yield mine[part]

    def _of(self, step: int) -> list[int]:
        """The samples of a step, the longest first."""
        found: list[int] = []
        first, samples = step * self.batch, len(self.lengths)
        for place in range(first, first + self.batch):
            epoch, at = divmod(place, samples)
            if not found or at == 0:
                shuffled = torch.Generator().manual_seed(self.seed + epoch)
                order = torch.randperm(samples, generator=shuffled)
            found.append(int(order[at]))
        return sorted(found, key=lambda i: -self.lengths[i])

    def divide(self) -> Steps:
        """With as many micro-batches as every step needs, and more where they save padding."""
        every = [
            [self.lengths[i] for i in found[rank :: self.size]]
            for found in map(self._of, range(self.steps))
            for rank in range(self.size)
        ]
        fewest = max(_needed(lengths, self.most) for lengths in every)
        count = min(fewest + _MORE, self.batch // self.size)
        costs = np.zeros(count)
        for lengths in every[: _LOOKED_AT * self.size]:
            costs += [cost for cost, _ in divisions(lengths, count, self.most)]
            costs += _EACH * np.arange(1, count + 1)
        return replace(self, micro_batches=fewest + int(costs[fewest - 1 :].argmin()))


@dataclass(frozen=True)
class TimedSteps(Sampler[list[int]]):
    """Steps whose time is taken, each one micro-batch: three of one sample, two of several.

    Args:
        samples: that there are.
        several: how many one process computes at a time.
        rank, size: of this process, of how many.
    """

    samples: int
    several: int
    rank: int
    size: int
    steps: int = 5
    micro_batches: int = 1
    small: int = 3

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.steps):
            count = 1 if step < self.small else self.several
            first = (step * self.size + self.rank) * self.several
            yield [i % self.samples for i in range(first, first + count)]


def _needed(lengths: Sequence[int], most: int) -> int:
    """The fewest parts of at most so many tokens: each as long as can be."""
    found, start = 0, 0
    while start < len(lengths):
        found, start = found + 1, start + max(1, most // lengths[start])
    return found


def divisions(lengths: Sequence[int], count: int, most: int) -> Iterator[tuple[float, list[slice]]]:
    """Samples in 1, 2, ... ``count`` parts of the least padding.

    Args:
        lengths: descending.
        count: at most one part for each sample.
        most: tokens of a part of several samples, padding included.

    Returns:
        for each number of parts the tokens, padding included, infinite where no such parts have
        few enough, and the parts.

    Complexity: count x samples^2.
    """
    size = len(lengths)
    first, last = np.arange(size)[:, None], np.arange(1, size + 1)[None]
    area = np.asarray(lengths, dtype=float)[:, None] * (last - first)
    # Of parts with as little padding those of like size.
    cost = np.where(last > first, area * (1 + 1e-6 * area), np.inf)
    cost[(area > most) & (last > first + 1)] = np.inf
    best, cuts = cost[0], []
    for n in range(count):
        if n:
            # total[i, j]: the samples up to i in the parts before, those behind it up to j here.
            total = best[:-1, None] + cost[1:]
            cuts.append(total.argmin(0) + 1)
            best = total.min(0)
        yield float(best[-1]), _slices(cuts, size)


def _slices(cuts: Sequence[np.ndarray], size: int) -> list[slice]:
    found, end = [], size
    for cut in reversed(cuts):
        start = int(cut[end - 1])
        found.append(slice(start, end))
        end = start
    return [slice(0, end), *reversed(found)]


class Rows(Dataset[dict[str, Tensor]]):
    """Samples as the Trainer takes them, without padding."""

    def __init__(self, tokens: TokenSet) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return self.tokens.samples

    def longest(self) -> dict[str, Tensor]:
        """The longest sample, as a batch."""
        return collate([self[int(self.tokens.mask.sum(1).argmax())]])

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        length = int(self.tokens.mask[i].sum())
        row = {"input_ids": self.tokens.input_ids[i, :length]}
        if self.tokens.counted is not None:
            row["counted"] = self.tokens.counted[i, :length]
        return row


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch, padded on the right; ``labels`` are -100 but where a prediction counts."""
    width = max(len(r["input_ids"]) for r in rows)

    def padded(values: Tensor) -> Tensor:
        rest = values.new_zeros(width - len(values))
        return torch.cat([values, rest])

    batch = {name: torch.stack([padded(r[name]) for r in rows]) for name in rows[0]}
    mask = torch.stack([padded(torch.ones_like(r["input_ids"])) for r in rows])
    labels = batch["input_ids"].masked_fill(batch.get("counted", mask) == 0, -100)
    # The first token of a row is never predicted; the count of the others scales the loss.
    labels[:, 0] = -100
    return {**batch, "attention_mask": mask, "labels": labels}
