"""The residual stream at every block boundary, for methods that use activations only."""

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
from isingcut.measure.splitting import chunks, split_to_fit
from isingcut.measure.work import Work
from isingcut.models.load import explain_nan
from isingcut.models.replay import Replay

# Streams of a micro-batch: before all blocks, and before and after one block.
_STREAMS = 3


def boundaries(
    replay: Replay, batches: Sequence[TokenSet], removed: Sequence[int] = ()
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Yield (b, i, stream before, stream after), both (B, T, D), of every block that stays.

    Micro-batches b come one after the other; with a streamed model, those of a chunk alternate.

    Raises:
        ModelError: the stream after a block is not finite.
    """
    blocks = [i for i in range(len(replay)) if i not in removed]
    for chunk, _ in chunks(replay, batches, _STREAMS):
        recordings = [replay.record(batch.input_ids) for batch in batches[chunk]]
        streams = [recording.entered for recording in recordings]
        for part in replay.store.sweep(blocks):
            i = int(part)
            for b, recording in enumerate(recordings):
                streams[b] = recording.bring(i, streams[b])
                after = recording.block(i, streams[b])
                _check_stream(replay, batches[chunk][b], i, after, removed)
                yield chunk.start + b, i, streams[b], after
                streams[b] = after


def _check_stream(
    replay: Replay, batch: TokenSet, i: int, stream: Tensor, removed: Sequence[int]
) -> None:
    """Raise if a stream (B, T, D) after block ``i`` is not finite at a real token."""
    bad = (batch.mask.to(stream.device) & ~stream.isfinite().flatten(2).all(2)).any(1)
    if not bad.any():
        return
    block, row = replay.blocks[i], batch.input_ids[int(bad.int().argmax())]
    # Not `i`: a plan replays only some of a model's blocks.
    path = next(name for name, m in replay.model.named_modules() if m is block)
    what = f"the output of block {path.rpartition('.')[2]} ({type(block).__name__})"
    raise explain_nan(replay.model, what, row.tolist(), removed)


def check_finite(
    replay: Replay, batch: TokenSet, found: Floats, states: States | None = None
) -> None:
    """Raise if numbers measured on a micro-batch are not finite.

    The model then runs again, block by block, to find the first block whose output is not finite.

    Args:
        found: numbers of the original; or (K, S, R), of S states.
        states: (S, N), for the latter.

    Raises:
        ModelError: a number is NaN or infinite; the message names model, block and text.
    """
    bad = ~np.isfinite(found)
    if not bad.any():
        return
    removed = [] if states is None else blocks_of(states[int(bad.any((0, 2)).argmax())])
    with torch.no_grad():
        for _ in boundaries(replay, [batch], removed):
            pass
    raise explain_nan(replay.model, "a loss or gradient", batch.input_ids[0].tolist(), removed)


def block_means(
    replay: Replay,
    tokens: TokenSet,
    work: Work,
    score: Callable[[Tensor, Tensor], Tensor],
    *,
    removed: Sequence[int] = (),
) -> Floats:
    """Average over tokens a score (K,) of each block's streams (K, D) before and after it.

    Returns:
        (N,) float64; infinite at removed blocks.
    """
    batches = tokens.batches(work.batch_tokens)
    steps = len(batches) * (len(replay) - len(removed))
    with work.progress("comparing block outputs", steps) as bar:

        def compute(some: Sequence[TokenSet]) -> list[Floats]:
            sums = np.zeros((len(some), len(replay)))
            for b, i, before, after in boundaries(replay, some, removed):
                real = some[b].looked_at.to(after.device)
                values = score(before[real].float(), after[real].float())
                sums[b, i] = float(values.sum(dtype=torch.float64))
                bar.advance(1)
            return list(sums)

        total = _summed(replay, batches, compute)
    total[list(removed)] = np.inf
    return np.asarray(total / int(tokens.looked_at.sum()))


def _summed(
    replay: Replay,
    batches: Sequence[TokenSet],
    compute: Callable[[Sequence[TokenSet]], list[Floats]],
) -> Floats:
    """Sum over micro-batches; for a model in memory, one after the other."""
    groups = [batches] if replay.streamed else [[batch] for batch in batches]
    with torch.inference_mode():
        found = [split_to_fit(replay.limit, group, compute, operator.add) for group in groups]
    return np.asarray(sum(itertools.chain.from_iterable(found)))


def one_pass(replay: Replay, tokens: TokenSet, work: Work) -> tuple[Floats, Floats]:
    """Score blocks by one pass of the original.

    Returns:
        (N,) block influence, the mean `influence` over all tokens; and (N + 1, N + 1) the mean
        `angle` between the streams at any two boundaries, at each sample's last token.
    """
    n = len(replay)
    batches = tokens.batches(work.batch_tokens)
    with work.progress("comparing block outputs", n * len(batches)) as bar:

        def compute(some: Sequence[TokenSet]) -> list[Floats]:
            """Return angles (N + 1, N + 1), with the influences as last row."""
            found = np.zeros((len(some), n + 2, n + 1))
            streams: list[list[Tensor]] = [[] for _ in some]
            for b, i, before, after in boundaries(replay, some):
                real, own = some[b].looked_at.to(after.device), streams[b]
                end = some[b].last_looked_at.to(after.device)
                values = influence(before[real].float(), after[real].float())
                found[b, n + 1, i] = float(values.sum(dtype=torch.float64))
                own += [x[end].float().to(replay.device) for x in [before] * (not own) + [after]]
                bar.advance(1)
            for b, own in enumerate(streams):
                for i, j in itertools.combinations(range(n + 1), 2):
                    found[b, i, j] = float(angle(own[i], own[j]).sum())
            return list(found)

        total = _summed(replay, batches, compute)
    angles = total[: n + 1]
    return total[n + 1, :n] / int(tokens.looked_at.sum()), (angles + angles.T) / tokens.samples


def lowest(scores: Floats, count: int) -> tuple[int, ...]:
    """Return the ``count`` blocks of lowest score, ascending; ties go to the earlier block."""
    return tuple(sorted(int(i) for i in np.argsort(scores, kind="stable")[:count]))


def influence(before: Tensor, after: Tensor) -> Tensor:
    """Return (K,) 1 - cosine of streams (K, D)."""
    return 1 - torch.nn.functional.cosine_similarity(before, after, dim=-1)


def angle(a: Tensor, b: Tensor) -> Tensor:
    """Return (K,) float64 angles between streams (K, D), in units of pi."""
    cosine = torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1)
    return cosine.clamp(-1, 1).arccos() / math.pi
