"""The residual stream at every block boundary, for methods that look at activations only."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from isingcut.data.calibration import TokenSet
from isingcut.ising.states import Floats
from isingcut.measure.pace import chunks
from isingcut.measure.work import Work
from isingcut.models.replay import Replay

# Of a micro-batch: what entered the blocks, what enters one and what leaves it.
_STREAMS = 3


def boundaries(
    replay: Replay, batches: Sequence[TokenSet], removed: Sequence[int] = (), *, kept: int = 0
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """(b, i, stream before, stream after), both (B, T, D), of every block that is not removed.

    One micro-batch b after the other; those of a chunk of a streamed model by turns.

    Args:
        kept: streams that the caller keeps of each micro-batch.
    """
    blocks = [i for i in range(len(replay)) if i not in removed]
    for chunk, _ in chunks(replay, batches, _STREAMS + kept):
        recordings = [replay.record(batch.input_ids) for batch in batches[chunk]]
        streams = [recording.entered for recording in recordings]
        for part in replay.store.sweep(blocks):
            i = int(part)
            for b, recording in enumerate(recordings):
                after = recording.block(i, streams[b])
                yield chunk.start + b, i, streams[b], after
                streams[b] = after


def block_means(
    replay: Replay,
    tokens: TokenSet,
    work: Work,
    score: Callable[[Tensor, Tensor], Tensor],
    *,
    removed: Sequence[int] = (),
) -> Floats:
    """Mean over the tokens looked at of a score (K,) of each block's streams (K, D) before, after.

    Returns:
        (N,) float64; infinite at removed blocks.
    """
    sums = np.full(len(replay), np.inf)
    sums[[i for i in range(len(replay)) if i not in removed]] = 0.0
    batches = tokens.batches(work.batch_tokens)
    steps = len(batches) * (len(replay) - len(removed))
    with work.progress("comparing block outputs", steps) as bar, torch.inference_mode():
        for b, i, before, after in boundaries(replay, batches, removed):
            real = batches[b].looked_at.to(replay.device)
            values = score(before[real].float(), after[real].float())
            sums[i] += float(values.sum(dtype=torch.float64))
            bar.advance(1)
    return sums / int(tokens.looked_at.sum())


def one_pass(replay: Replay, tokens: TokenSet, work: Work) -> tuple[Floats, Floats]:
    """What the original alone, run once, says of its blocks.

    Returns:
        (N,) block influence, the mean `influence` over all tokens looked at; and (N + 1, N + 1)
        the mean `angle` between the streams at any two boundaries, at each sample's last of them.
    """
    n = len(replay)
    sums, angles = np.zeros(n), np.zeros((n + 1, n + 1))
    batches = tokens.batches(work.batch_tokens)
    ends = [batch.last_looked_at.to(replay.device) for batch in batches]
    streams: list[list[Tensor]] = [[] for _ in batches]
    with work.progress("comparing block outputs", n * len(batches)) as bar, torch.inference_mode():
        for b, i, before, after in boundaries(replay, batches):
            real, own = batches[b].looked_at.to(replay.device), streams[b]
            values = influence(before[real].float(), after[real].float())
            sums[i] += float(values.sum(dtype=torch.float64))
            own += [before[ends[b]].float()] * (not own) + [after[ends[b]].float()]
            bar.advance(1)
        for own in streams:
            for i, j in itertools.combinations(range(n + 1), 2):
                angles[i, j] += float(angle(own[i], own[j]).sum())
    return sums / int(tokens.looked_at.sum()), (angles + angles.T) / tokens.samples


def lowest(scores: Floats, count: int) -> tuple[int, ...]:
    """The ``count`` blocks of lowest score, ascending; ties go to the earlier block."""
    return tuple(sorted(int(i) for i in np.argsort(scores, kind="stable")[:count]))


def influence(before: Tensor, after: Tensor) -> Tensor:
    """1 - cosine of streams (K, D): (K,)."""
    return 1 - torch.nn.functional.cosine_similarity(before, after, dim=-1)


def angle(a: Tensor, b: Tensor) -> Tensor:
    """Angle between streams (K, D) in units of pi: (K,) float64."""
    cosine = torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1)
    return cosine.clamp(-1, 1).arccos() / math.pi
