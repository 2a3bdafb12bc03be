"""A few of a model's own blocks, timed: what every measurement of it is made of.

Only these blocks, the embedding and the output head are read from the checkpoint, so that a model
far larger than memory is probed in seconds. Every measurement runs on a few blocks, on half of
them and on one: what it grows by belongs to the blocks, the rest to the head and what is done once.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import nnls
from torch import nn

from isingcut.data.tokens import TokenSet
from isingcut.errors import ArchitectureError
from isingcut.ising.states import Floats
from isingcut.measure.curvature import KINDS, gate_curvature
from isingcut.measure.gradients import gate_gradients
from isingcut.measure.losses import measure
from isingcut.models.architectures import find_stack, stack_modules, text_config
from isingcut.models.compute.tuning import few_threads, kept_bytes, tune
from isingcut.models.parts import EMBED, HEAD
from isingcut.models.replay import Replay
from isingcut.models.streaming.plan import Copied
from isingcut.models.streaming.store import Store

# At most so many blocks that weigh no more than that; but one of every kind.
_BLOCKS, _ENOUGH_BYTES = 6, 1 << 30
_ROUNDS = 2
# A call that takes longer is timed once, and slower blocks on one sample only.
_LONG_SECONDS, _SLOW_SECONDS = 1.0, 0.25
_SEQUENCE = 128
_STATES = 4


class Part(NamedTuple):
    """What a measurement takes of each token: in the head and once, and in all N blocks."""

    once: float
    blocks: float

    @property
    def whole(self) -> float:
        """Both."""
        return self.once + self.blocks


@dataclass(frozen=True)
class Timings:
    """What the parts of a model of N blocks cost on this machine.

    Attributes:
        latency: (N,) seconds of each block for one sequence of up to 128 tokens.
        word: seconds of all blocks for a single token.
        reading: seconds per byte of weights in memory, read from disk and converted.
        parts: seconds a token of a ``forward`` pass, of one more ``state`` after it, of all
            ``gradients``, of a ``hessian`` and a ``gauss-newton`` matrix; bytes a token that the
            graphs of the gradients keep, ``saved``, and those of a matrix, ``saved twice``.
            Nothing of matrices where a model cannot be differentiated twice.
    """

    latency: tuple[float, ...]
    word: float
    reading: float
    parts: dict[str, Part]


def probe(
    model: Any,
    store: Store,
    length: int,
    batch_tokens: int,
    *,
    attention: str | None = None,
    twice: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> Timings:
    """Time a few blocks, the head and the disk; the model's other blocks do nothing afterwards.

    Args:
        model, store: as `isingcut.models.streaming.replay.open_model` gives them.
        length: tokens of a sample.
        batch_tokens: tokens of a micro-batch; fewer are timed where blocks are slow.
        attention: transformers' name of an implementation; None times which is faster.
        twice: also time double backward passes.
        clock: seconds.

    Raises:
        ArchitectureError: the blocks cannot be run one at a time.
    """
    kinds = [store.like(i) for i in range(len(find_stack(model)))]
    n, chosen = len(kinds), _choose(store, kinds, least=3 if twice else 2)
    _forget_cached(store, chosen)
    reading = sum(store.keep(i) for i in chosen) / sum(store.size(i) for i in chosen)
    for part in (EMBED, HEAD):
        store.keep(part)
    few = only(model, chosen, store.device)
    # What some kinds keep grows with the number of blocks: as many as the model has.
    whole = n * batch_tokens // len(few)
    how = tune(few, length, attention=attention, batch_tokens=whole, memory=0)

    def by_kind(tokens: int) -> list[float]:
        seconds = dict[Any, list[float]]()
        for i, one in zip(chosen, few.latency(tokens), strict=True):
            seconds.setdefault(kinds[i], []).append(one)
        return [statistics.mean(seconds[kind]) for kind in kinds]

    with few_threads(how.threads):
        latency, word = by_kind(min(_SEQUENCE, length)), sum(by_kind(1))
        rows = 1 if max(latency) > _SLOW_SECONDS else max(1, batch_tokens // length)
        batch = random_text(model, rows, length)
        found, sizes = [], []
        for count in sorted({len(chosen), (len(chosen) + 1) // 2, 1}, reverse=True):
            fewer = only(model, chosen[:count], store.device)
            fewer.attention = how.attention
            found.append(_costs(fewer, batch, twice, clock))
            sizes.append((1.0, sum(latency[i] for i in chosen[:count]) / sum(latency), count))
    return Timings(tuple(latency), word, reading, _grown(found, np.array(sizes), n))


def _grown(found: Sequence[dict[str, float]], sizes: Floats, n: int) -> dict[str, Part]:
    """What the whole model takes, from what parts of it took.

    Args:
        sizes: (S, 3): one, the share of the blocks' time that is in the part, and its blocks.

    A matrix has a row for each block, and each row goes through the head and through all blocks.
    """
    parts = {}
    one, share, count = sizes.T
    for name in set.intersection(*map(set, found)):
        values = np.array([costs[name] for costs in found])
        if name in KINDS:
            once, row, blocks = nnls(np.stack([one, count, count * share], 1), values)[0]
            parts[name] = Part(once + n * row, n * blocks)
        else:
            parts[name] = Part(*nnls(np.stack([one, share], 1), values)[0])
    return parts


def only(model: Any, chosen: Sequence[int], device: torch.device) -> Replay:
    """A few blocks of a model; from now on its other blocks hand on the stream they are given."""
    every = stack_modules(model, find_stack(model))
    rest: list[Any] = [None]

    def learn(module: nn.Module, args: Any, output: Any) -> None:
        rest[0] = output[1:] if isinstance(output, tuple) else None

    def hand_on(*args: Any, **kwargs: Any) -> Any:
        stream = args[0] if args else kwargs["hidden_states"]
        return stream if rest[0] is None else (stream, *rest[0])

    for i, block in enumerate(every):
        if i in chosen:
            block.register_forward_hook(learn)
        else:
            block.__dict__["forward"] = hand_on
    return Replay(model.requires_grad_(False), [every[i] for i in chosen], device)


def random_text(model: Any, rows: int, length: int) -> TokenSet:
    """Words drawn at random, so that routers of experts spread them as a text's."""
    words = int(text_config(model).vocab_size)
    ids = torch.randint(0, words, (rows, length), generator=torch.Generator().manual_seed(0))
    return TokenSet(ids, torch.ones_like(ids, dtype=torch.bool), torch.arange(rows))


def _costs(
    replay: Replay, batch: TokenSet, twice: bool, clock: Callable[[], float]
) -> dict[str, float]:
    """What measuring a micro-batch takes on these blocks, as in `Timings.parts`."""
    tokens, first = int(batch.input_ids.numel()), batch.select([0])
    length = int(first.input_ids.numel())

    def states(count: int) -> Callable[[], object]:
        # Each lacks all blocks from one on: they take no more than their output heads.
        ends = np.triu(np.ones((count, len(replay)), dtype=bool))
        return lambda: measure(replay, batch, ends, batch_tokens=tokens)

    def gradients(of: TokenSet) -> Callable[[], object]:
        return lambda: gate_gradients(replay, of, batch_tokens=tokens)

    def matrix(kind: str) -> Callable[[], object]:
        return lambda: gate_curvature(replay, first, kind, batch_tokens=length)

    def seconds(run: Callable[[], object]) -> float:
        return fastest(run, clock, replay.device)

    forward, count = seconds(states(0)) / tokens, min(_STATES, len(replay))
    found = {
        "forward": forward,
        "state": max(0.0, seconds(states(count)) / tokens - forward) / count,
        "gradients": seconds(gradients(batch)) / tokens,
        "saved": kept_bytes(replay.model, gradients(first)) / length,
    }
    if not twice:
        return found
    try:
        for kind in KINDS:
            found[kind] = seconds(matrix(kind)) / length
        found["saved twice"] = kept_bytes(replay.model, matrix("hessian")) / length
    except (ArchitectureError, RuntimeError):
        return {name: value for name, value in found.items() if name not in KINDS}
    return found


def fastest(run: Callable[[], object], clock: Callable[[], float], device: torch.device) -> float:
    """Seconds of a call: what else a machine does only ever adds."""

    def seconds() -> float:
        began = clock()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock() - began

    # The first one warms up.
    first = seconds()
    return min(seconds() for _ in range(_ROUNDS if first < _LONG_SECONDS else 1))


def _choose(store: Store, kinds: Sequence[object], least: int) -> list[int]:
    """The first block, one of every kind, and a few more spread over the model."""
    most = max(least, min(_BLOCKS, _ENOUGH_BYTES // store.largest))
    spread = {round(k * (len(kinds) - 1) / (most - 1)) for k in range(most)}
    return sorted({kinds.index(kind) for kind in kinds} | spread)


def _forget_cached(store: Store, blocks: Sequence[int]) -> None:
    """Take the blocks' bytes out of the system's cache: reading shall be timed from the disk."""
    if not hasattr(os, "posix_fadvise"):
        return
    for step in (step for i in blocks for step in store.reader.plans[i].steps):
        for source in [step.source] if isinstance(step, Copied) else [s for _, s in step.sources]:
            with source.file.open("rb") as f:
                os.posix_fadvise(f.fileno(), source.start, source.size, os.POSIX_FADV_DONTNEED)
