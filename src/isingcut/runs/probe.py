"""A few of a model's own blocks, timed: what every measurement of it is made of.

Only these blocks, the embedding and the output head are read from the checkpoint, so that a model
far larger than memory is probed in seconds. A pass through a few blocks and one through a single
block say what all blocks take, and what the rest.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from isingcut.data.tokens import TokenSet
from isingcut.energies.search import Target
from isingcut.measure.gradients import gate_gradients
from isingcut.measure.losses import measure
from isingcut.models.architectures import find_stack, stack_modules, text_config
from isingcut.models.compute.tuning import kept_bytes, tune
from isingcut.models.device import few_threads
from isingcut.models.inspect import Inspection
from isingcut.models.parts import EMBED, HEAD
from isingcut.models.replay import Replay
from isingcut.models.streaming.plan import Copied
from isingcut.models.streaming.store import Store
from isingcut.options.config import RunConfig
from isingcut.runs.removal import each_removal, removal_rows

# At most so many blocks that weigh no more than that; but one of every kind.
_BLOCKS, _ENOUGH_BYTES = 6, 1 << 30
# A call that takes longer is timed once, and slower blocks on one sample only.
_LONG_SECONDS, _SLOW_SECONDS = 1.0, 0.25
_SEQUENCE = 128


@dataclass(frozen=True)
class Timings:
    """What a model of N blocks takes on this machine.

    Attributes:
        latency: (N,) seconds of each block for one sequence of up to 128 tokens.
        reading: seconds per byte of weights in memory, read from disk and converted.
        blocks, once: seconds a token of a forward pass, in all blocks and in the rest.
        saved: bytes a token that the graphs of the gradients keep.
    """

    latency: tuple[float, ...]
    reading: float
    blocks: float
    once: float
    saved: float


def probe(
    model: Any,
    store: Store,
    length: int,
    batch_tokens: int,
    attention: str | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Timings:
    """Time a few blocks, the head and the disk; the model's other blocks do nothing afterwards.

    Args:
        model, store: as `isingcut.models.streaming.replay.open_model` gives them.
        length: tokens of a sample.
        batch_tokens: tokens of a micro-batch; fewer are timed where blocks are slow.
        attention: transformers' name of an implementation; None keeps the loaded one.
        clock: seconds.

    Raises:
        ArchitectureError: the blocks cannot be run one at a time.
    """
    kinds = [store.like(i) for i in range(len(find_stack(model)))]
    n, chosen = len(kinds), _choose(store, kinds)
    _forget_cached(store, chosen)
    reading = sum(store.keep(i) for i in chosen) / sum(store.size(i) for i in chosen)
    for part in (EMBED, HEAD):
        store.keep(part)
    few = only(model, chosen, store.device)
    # What some kinds keep grows with the number of blocks: as many as the model has.
    whole = n * batch_tokens // len(few)
    how = tune(few, length, attention=attention, batch_tokens=whole, memory=0)

    with few_threads(how.threads):
        seconds = dict[Any, list[float]]()
        for i, one in zip(chosen, few.latency(min(_SEQUENCE, length)), strict=True):
            seconds.setdefault(kinds[i], []).append(one)
        latency = [statistics.mean(seconds[kind]) for kind in kinds]
        rows = 1 if max(latency) > _SLOW_SECONDS else max(1, batch_tokens // length)
        batch = random_text(model, rows, length)
        few.attention, first = how.attention, batch.select([0])
        forward = _forward(few, batch, clock)
        saved = kept_bytes(model, lambda: gate_gradients(few, first, batch_tokens=length)) / length
        # Last: the others of the few do nothing from here on.
        single = only(model, chosen[:1], store.device)
        single.attention = how.attention
        less = _forward(single, batch, clock)
    share, own = (sum(latency[i] for i in some) / sum(latency) for some in (chosen, chosen[:1]))
    blocks = min(forward / share, max(0.0, forward - less) / (share - own or 1.0))
    once = forward - share * blocks
    return Timings(tuple(latency), reading, blocks, once, n / len(few) * saved)


def only(model: Any, chosen: Sequence[int], device: torch.device) -> Replay:
    """A few blocks of a model; from now on its other blocks hand on the stream they are given."""
    every = stack_modules(model, find_stack(model))
    rest: list[Any] = [None]

    def learn(module: nn.Module, args: Any, output: Any) -> None:
        rest[0] = output[1:] if isinstance(output, (list, tuple)) else None

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


def _forward(replay: Replay, batch: TokenSet, clock: Callable[[], float]) -> float:
    """Seconds a token of a pass through these blocks and the head."""
    tokens, seconds = int(batch.input_ids.numel()), list[float]()
    none = np.zeros((0, len(replay)), dtype=bool)
    # The first one warms up; what else a machine does only ever adds.
    while len(seconds) < 2 or (len(seconds) < 3 and seconds[0] < _LONG_SECONDS):
        began = clock()
        measure(replay, batch, none, batch_tokens=tokens)
        seconds.append(clock() - began)
    return min(seconds[1:]) / tokens


def _choose(store: Store, kinds: Sequence[object]) -> list[int]:
    """The first block, one of every kind, and a few more spread over the model."""
    most = max(2, min(_BLOCKS, _ENOUGH_BYTES // store.largest))
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


def removed_count(
    config: RunConfig,
    found: Inspection,
    latency: Sequence[float],
    size: Callable[[int], int],
    total: int,
) -> int:
    """How many blocks go: of a budget as many as it takes; a fifth where nothing is said.

    Args:
        latency: seconds of each block.
        size: bytes of a block, ``total`` those of all weights.
    """
    if not config.removal:
        return max(1, len(latency) // 5)
    described = {
        "blocks": [
            {**vars(b), "latency_seconds": seconds, "bytes": size(b.index)}
            for b, seconds in zip(found.stack.blocks, latency, strict=True)
        ],
        "legality": [vars(row) for row in found.rows],
        "total_parameters": found.parameters,
        "total_bytes": total,
    }
    last = each_removal(config)[-1]
    return Target.of(last.removal, removal_rows(described, last), len(latency)).size
