"""The residual stream at every block boundary, for methods that use activations only."""

import itertools
import math
import operator
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from isingcut.data.tokens import TokenSet
from isingcut.ising.states import Floats, States, blocks_of
from isingcut.measure.splitting import chunks, split_to_fit
from isingcut.measure.work import Work
from isingcut.models.compute.head import Comparison
from isingcut.models.device import allowance
from isingcut.models.load import explain_nan
from isingcut.models.replay import Replay, use_attention

# Hidden states kept per micro-batch: before all blocks, and before and after one block.
_STREAMS = 3


class Kept:
    """What patched states share on one text, by the number of its micro-batches.

    Attributes:
        original: the original's hidden states (B, T, D) after a block, in host memory.
        logits: the original's logits of a micro-batch, on its device.
    """

    def __init__(self) -> None:
        self.original = dict[tuple[int, int], list[Tensor]]()
        self.logits = dict[tuple[int, int], Comparison]()
        self._patched = OrderedDict[Hashable, tuple[list[Tensor], Any]]()

    def keep_original(self, key: tuple[int, int], streams: Sequence[Tensor]) -> None:
        """Keep the original's hidden states, if all take at most a quarter of the free memory."""
        own = [*self.original.values(), streams]
        room = allowance("", torch.device("cpu")).left // 4
        if sum(tensor.nbytes for each in own for tensor in each) <= room:
            self.original[key] = [stream.cpu() for stream in streams]

    def keep(self, key: Hashable, streams: Sequence[Tensor], patch: Any = "") -> None:
        """Keep hidden states behind some cuts, with the patch of the last one, in host memory.

        Those not used for the longest time go when all take a quarter of the free memory.
        """
        host = torch.device("cpu")
        self._patched[key] = [stream.to(host) for stream in streams], patch
        each = [
            sum(t.nbytes for t in (*own, *getattr(one, "parameters", {}).values()))
            for own, one in self._patched.values()
        ]
        over = sum(each) - allowance("", host).left // 4
        for size in each:
            if over > 0:
                self._patched.popitem(last=False)
                over -= size

    def find(self, key: Hashable) -> tuple[list[Tensor], Any] | None:
        """Return what was kept for a key, or None."""
        if key in self._patched:
            self._patched.move_to_end(key)
        return self._patched.get(key)


class SampleStreams:
    """The original's hidden states before two blocks, by sample, in host memory.

    Args:
        batches: all micro-batches of a text.
        before: the hidden states (B, T, D) of each, before each of some blocks.

    Attributes:
        blocks: numbers of these blocks, ascending.
    """

    def __init__(
        self, batches: Sequence[TokenSet], before: dict[int, Sequence[Tensor]]
    ) -> None:
        self.blocks = sorted(before)
        samples = [int(row) for batch in batches for row in batch.index]
        self._rows = {
            i: dict(
                zip(samples, (row for s in streams for row in s.cpu()), strict=True)
            )
            for i, streams in before.items()
        }

    def of(self, i: int, samples: Sequence[int], width: int) -> Tensor:
        """Return the hidden states (B, T, D) of some samples before block ``i``, T = ``width``.

        Samples are cut or padded with zeros, at positions that count nowhere.
        """
        rows = (self._rows[i][sample] for sample in samples)
        return torch.stack([pad(row, (0, 0, 0, width - len(row))) for row in rows])


def boundaries(
    replay: Replay, batches: Sequence[TokenSet], removed: Sequence[int] = ()
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Yield (b, i, before, after) of every kept block, with hidden states (B, T, D) around it.

    Micro-batches b come one after the other; for a streamed model, those of a chunk alternate.

    Raises:
        ModelError: the hidden states after a block are not finite.
    """
    blocks = [i for i in range(len(replay)) if i not in removed]
    for chunk, _ in chunks(replay, batches, _STREAMS):
        recordings = [replay.record(batch.input_ids) for batch in batches[chunk]]
        streams = [recording.entered for recording in recordings]
        for part in replay.store.sweep(blocks):
            i = int(part)
            for b, recording in enumerate(recordings):
                streams[b] = recording.move_to_block(i, streams[b])
                after = recording.block(i, streams[b])
                _check_stream(replay, batches[chunk][b], i, after, removed)
                yield chunk.start + b, i, streams[b], after
                streams[b] = after


def _check_stream(
    replay: Replay, batch: TokenSet, i: int, stream: Tensor, removed: Sequence[int]
) -> None:
    """Raise an error if hidden states (B, T, D) after block ``i`` are not finite at real tokens."""
    bad = (batch.mask.to(stream.device) & ~stream.isfinite().flatten(2).all(2)).any(1)
    if not bad.any():
        return
    row = batch.input_ids[int(bad.int().argmax())]
    what = f"the output of block {i} ({type(replay.blocks[i]).__name__})"
    raise explain_nan(replay.model, what, row.tolist(), removed)


def check_finite(
    model: Any,
    batch: TokenSet,
    numbers: Floats,
    states: States | None = None,
    what: str = "a loss or gradient",
) -> None:
    """Raise an error if numbers measured on samples are not finite.

    The blocks of a `Replay` then run again, to find the first whose output is not finite.

    Args:
        model: a `Replay` or a model of transformers.
        numbers: (R, ...) of the original model, or (K, S, R) of S states; R samples.
        states: (S, N) states, if ``numbers`` are of states.
        what: name of the numbers in the message.

    Raises:
        ModelError: a number is NaN or infinite; the message names model, block and text.
    """
    bad = ~np.isfinite(numbers)
    if not bad.any():
        return
    removed = list[int]()
    if states is not None:
        state = int(bad.any((0, 2)).argmax())
        bad = bad[:, state].T
        removed = blocks_of(states[state])
    one = batch.select([int(np.argwhere(bad)[0, 0])])
    if isinstance(model, Replay):
        with torch.no_grad():
            for _ in boundaries(model, [one], removed):
                pass
        model = model.model
    raise explain_nan(model, what, one.input_ids[0].tolist(), removed)


def one_pass(replay: Replay, tokens: TokenSet, work: Work) -> tuple[Floats, Floats]:
    """Score blocks by one forward pass of the original model.

    For a model in memory, micro-batches are processed one after the other.

    Returns:
        (N,) block influence, the mean `influence` over all tokens; and (N + 1, N + 1) the mean
        `angle` between the hidden states at any two boundaries, at each sample's last token.
    """
    n = len(replay)
    batches = tokens.batches(work.batch_tokens)
    with work.progress("comparing block outputs", len(batches) * n) as bar:

        def compute(some: Sequence[TokenSet]) -> list[Floats]:
            # Sums over tokens: angles of two boundaries, and influences as last row.
            sums = np.zeros((len(some), n + 2, n + 1))
            streams: list[list[Tensor]] = [[] for _ in some]
            for b, i, before, after in boundaries(replay, some):
                real = some[b].compared.to(after.device)
                values = influence(before[real].float(), after[real].float())
                sums[b, -1, i] = float(values.sum(dtype=torch.float64))
                end = some[b].last_compared.to(after.device)
                new = [after] if streams[b] else [before, after]
                streams[b] += [x[end].float().to(replay.device) for x in new]
                bar.advance(1)
            for b, own in enumerate(streams):
                for i, j in itertools.combinations(range(n + 1), 2):
                    sums[b, i, j] = float(angle(own[i], own[j]).sum())
            return list(sums)

        groups = [batches] if replay.streamed else [[batch] for batch in batches]
        with torch.inference_mode(), use_attention(replay):
            sums = [
                split_to_fit(replay.limit, group, compute, operator.add)
                for group in groups
            ]
    total = np.asarray(sum(itertools.chain.from_iterable(sums)))
    angles = total[:-1]
    influences = total[-1, :-1] / int(tokens.compared.sum())
    return influences, (angles + angles.T) / tokens.samples


def pick_blocks(scores: Floats, count: int) -> tuple[int, ...]:
    """Return the ``count`` blocks with the lowest scores, ascending; of ties, the earlier block."""
    return tuple(sorted(int(i) for i in np.argsort(scores, kind="stable")[:count]))


def influence(before: Tensor, after: Tensor) -> Tensor:
    """Return (K,) 1 - cosine similarity of hidden states (K, D)."""
    return 1 - torch.nn.functional.cosine_similarity(before, after, dim=-1)


def angle(a: Tensor, b: Tensor) -> Tensor:
    """Return (K,) float64 angles between hidden states (K, D), in units of pi."""
    cosine = torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1)
    return cosine.clamp(-1, 1).arccos() / math.pi
