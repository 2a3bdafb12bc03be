"""The residual stream at every block boundary, for methods that look at activations only."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from isingcut.data.calibration import TokenSet
from isingcut.ising.states import Floats, States, blocks_of
from isingcut.measure.splitting import split_to_fit
from isingcut.measure.work import Work
from isingcut.models.not_finite import not_finite
from isingcut.models.replay import Replay


def boundaries(
    replay: Replay, batch: TokenSet, removed: Sequence[int] = ()
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(i, stream before, stream after), both (B, T, D), of every block that is not removed.

    Raises:
        ModelError: the stream after a block is not finite.
    """
    recording = replay.record(batch.input_ids)
    stream, real = recording.entered, batch.mask.to(replay.device)
    for i in range(len(replay)):
        if i not in removed:
            after = recording.block(i, stream)
            bad = (real & ~after.isfinite().flatten(2).all(2)).any(1)
            if bad.any():
                block, row = replay.blocks[i], batch.input_ids[int(bad.int().argmax())]
                # Not `i`: a plan replays some of a model's blocks.
                path = next(name for name, m in replay.model.named_modules() if m is block)
                what = f"the output of block {path.rpartition('.')[2]} ({type(block).__name__})"
                raise not_finite(replay.model, what, row.tolist(), removed)
            yield i, stream, after
            stream = after


def check_finite(
    replay: Replay, batch: TokenSet, found: Floats, states: States | None = None
) -> None:
    """Refuse numbers measured on a micro-batch that are not finite.

    The model runs again, block by block, to find the first block whose output is not finite.

    Args:
        found: of the original; or (K, S, R), of S states.
        states: (S, N), for the latter.

    Raises:
        ModelError: one is NaN or infinite; the message names model, block and text.
    """
    bad = ~np.isfinite(found)
    if not bad.any():
        return
    removed = [] if states is None else blocks_of(states[int(bad.any((0, 2)).argmax())])
    with torch.no_grad():
        for _ in boundaries(replay, batch, removed):
            pass
    raise not_finite(replay.model, "a loss or gradient", batch.input_ids[0].tolist(), removed)


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

    def compute(some: Sequence[TokenSet]) -> list[Floats]:
        return [of_batch(batch) for batch in some]

    def of_batch(batch: TokenSet) -> Floats:
        found = np.zeros(len(replay))
        real = batch.looked_at.to(replay.device)
        for i, before, after in boundaries(replay, batch, removed):
            values = score(before[real].float(), after[real].float())
            found[i] = float(values.sum(dtype=torch.float64))
        return found

    batches = tokens.batches(work.batch_tokens)
    with work.progress("comparing block outputs", len(batches)) as bar, torch.inference_mode():
        for batch in batches:
            sums += split_to_fit(replay.limit, [batch], compute, operator.add)[0]
            bar.advance(1)
    return sums / int(tokens.looked_at.sum())


def one_pass(replay: Replay, tokens: TokenSet, work: Work) -> tuple[Floats, Floats]:
    """What the original alone, run once, says of its blocks.

    Returns:
        (N,) block influence, the mean `influence` over all tokens looked at; and (N + 1, N + 1)
        the mean `angle` between the streams at any two boundaries, at each sample's last of them.
    """
    n = len(replay)
    sums, angles = np.zeros(n + 1), np.zeros((n + 1, n + 1))

    def compute(some: Sequence[TokenSet]) -> list[Floats]:
        return [of_batch(batch) for batch in some]

    def of_batch(batch: TokenSet) -> Floats:
        """Angles (N + 1, N + 1), and below them the influences."""
        found = np.zeros((n + 2, n + 1))
        real = batch.looked_at.to(replay.device)
        ends, streams = batch.last_looked_at.to(replay.device), list[Tensor]()
        for i, before, after in boundaries(replay, batch):
            values = influence(before[real].float(), after[real].float())
            found[n + 1, i] = float(values.sum(dtype=torch.float64))
            if not streams:
                streams.append(before[ends].float())
            streams.append(after[ends].float())
        for i, j in itertools.combinations(range(n + 1), 2):
            found[i, j] = float(angle(streams[i], streams[j]).sum())
        return found

    batches = tokens.batches(work.batch_tokens)
    with work.progress("comparing block outputs", len(batches)) as bar, torch.inference_mode():
        for batch in batches:
            (found,) = split_to_fit(replay.limit, [batch], compute, operator.add)
            sums += found[n + 1]
            angles += found[: n + 1]
            bar.advance(1)
    return sums[:n] / int(tokens.looked_at.sum()), (angles + angles.T) / tokens.samples


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
