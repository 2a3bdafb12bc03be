"""A few of a model's own blocks, timed: what every measurement of it is made of.

Only these blocks, the input embedding and the output head are read from the checkpoint, so that
a model that is far larger than memory can be probed in seconds.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from isingcut.data.tokens import TokenSet
from isingcut.errors import ArchitectureError
from isingcut.measure import curvature, gradients
from isingcut.measure.loss_gradient import loss_gradient
from isingcut.models.architectures import find_stack, text_config
from isingcut.models.compute import tuning
from isingcut.models.compute.attention import chosen_attention
from isingcut.models.compute.head import OutputHead, comparison
from isingcut.models.replay import Recording, Replay, reuse_freed_memory
from isingcut.models.streaming.plan import EMBED, HEAD
from isingcut.models.streaming.store import Store
from isingcut.runs.some_blocks import SomeBlocks, choose, forget_cached

ROUNDS = 3
# Slower blocks are timed on no more tokens than one sample.
_SLOW_SECONDS = 0.25
_LONG_SECONDS = 2.0


@dataclass(frozen=True)
class Timings:
    """What the parts of one model cost on this machine.

    Attributes:
        blocks: seconds per token of a forward pass, of each of the N blocks.
        entering: seconds per token of the embedding and of all that is done once per text.
        comparing: seconds per token of one state's output head and KL.
        gradients: seconds per token of the gradients of all N gates.
        curvature: by kind, seconds per token of the whole matrix; absent where the model cannot
            be differentiated twice.
        decoding: seconds of one token with nothing beside it, through all blocks and the head.
        reading: seconds per byte of weights in memory, read from disk and converted.
        saved_gradients: bytes per token that the backward pass through all blocks keeps.
        saved_curvature: the same of the double backward pass.
        noise: the slowest over the fastest of the timed rounds, the median of all that was timed.
        tokens: timed at a time.
        probed: the blocks that were run.
        attention: the implementation that was timed; None for the loaded one.
    """

    blocks: tuple[float, ...]
    entering: float
    comparing: float
    gradients: float
    curvature: dict[str, float]
    decoding: float
    reading: float
    saved_gradients: int
    saved_curvature: int
    noise: float
    tokens: int
    probed: tuple[int, ...]
    attention: str | None


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
    """Time a few blocks, the head and the disk.

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
    reuse_freed_memory()
    n = len(find_stack(model))
    chosen = choose(store, n)
    forget_cached(store, chosen)
    reading = sum(store.keep(i) for i in chosen) / sum(store.size(i) for i in chosen)
    for part in (EMBED, HEAD):
        store.keep(part)
    replay = SomeBlocks(model, store, chosen)
    # What some kinds keep grows with the number of blocks: as many as the model has.
    whole = n * batch_tokens // len(chosen)
    how = tuning.tune(replay, length, attention=attention, batch_tokens=whole, memory=0)
    replay.attention = how.attention
    watch = Stopwatch(replay.device, clock)
    with tuning.few_threads(how.threads):
        with chosen_attention(replay):
            found = _timed(replay, length, batch_tokens, reading, watch)
        # Double backward passes take PyTorch's plain attention, whatever was chosen.
        return _with_curvature(found, replay, length, watch) if twice else found


class Stopwatch:
    """Times calls: once to warm up, then the fastest of a few rounds; and how much they differ."""

    def __init__(self, device: torch.device, clock: Callable[[], float]) -> None:
        self._device, self._clock = device, clock
        self._ratios: list[float] = []

    @property
    def noise(self) -> float:
        """The slowest over the fastest round, the median of all calls."""
        return statistics.median(self._ratios) if self._ratios else 1.0

    def fastest(self, run: Callable[[], object]) -> float:
        """Seconds of one call."""
        first = self._seconds(run)
        rounds = [self._seconds(run) for _ in range(ROUNDS if first < _LONG_SECONDS else 1)]
        if len(rounds) > 1:
            self._ratios.append(max(rounds) / max(1e-9, min(rounds)))
        return min(rounds)

    def _seconds(self, run: Callable[[], object]) -> float:
        self._wait()
        began = self._clock()
        run()
        self._wait()
        return self._clock() - began

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _timed(
    replay: SomeBlocks,
    length: int,
    batch_tokens: int,
    reading: float,
    watch: Stopwatch,
) -> Timings:
    one = _text(replay, 1, length)
    with torch.inference_mode():
        recording = replay.record(one.input_ids)
        slow = watch.fastest(lambda: _through(replay, recording)) > _SLOW_SECONDS * len(replay)
        batch = one if slow else _text(replay, max(1, batch_tokens // length), length)
        tokens = int(batch.input_ids.numel())
        recording = replay.record(batch.input_ids)
        blocks, scale = _blocks(replay, watch, recording, tokens)
        entering = watch.fastest(lambda: replay.record(batch.input_ids))
        head = OutputHead(replay)
        original = comparison(head, recording, recording.entered, batch)
        comparing = watch.fastest(lambda: original.compare(recording.entered))
        word = replay.record(batch.input_ids[:1, :1])
        decoding = scale * watch.fastest(lambda: _through(replay, word))
        decoding += watch.fastest(lambda: word.logits(word.entered[0], 0))
    once_through = functools.partial(gradients._batch_rows, replay, head, one, "sublayer", None)
    saved_once = _kept_bytes(replay, once_through)
    whole = watch.fastest(lambda: gradients._batch_rows(replay, head, batch, "sublayer", None))
    with torch.no_grad():
        recording = replay.record(batch.input_ids)
    once = watch.fastest(lambda: loss_gradient(recording, recording.entered, batch, None, head))
    return Timings(
        blocks=blocks,
        entering=entering / tokens,
        comparing=comparing / tokens,
        gradients=(once + max(0.0, whole - once) * scale) / tokens,
        curvature={},
        decoding=decoding,
        reading=reading,
        saved_gradients=int(saved_once * scale / length),
        saved_curvature=0,
        noise=watch.noise,
        tokens=tokens,
        probed=tuple(replay.chosen),
        attention=replay.attention,
    )


def _blocks(
    replay: SomeBlocks, watch: Stopwatch, recording: Recording, tokens: int
) -> tuple[tuple[float, ...], float]:
    """Seconds per token of each of the N blocks, and all of them in units of the timed ones."""
    stream = recording.entered
    of_kind: dict[Any, list[float]] = {}
    for i, number in enumerate(replay.chosen):
        seconds = watch.fastest(functools.partial(recording.block, i, stream))
        of_kind.setdefault(replay.kinds[number], []).append(seconds / tokens)
    blocks = tuple(statistics.mean(of_kind[kind]) for kind in replay.kinds)
    return blocks, sum(blocks) / sum(map(sum, of_kind.values()))


def _with_curvature(found: Timings, replay: SomeBlocks, length: int, watch: Stopwatch) -> Timings:
    """The same, with what second derivatives take; without where the model has none."""
    one, head = _text(replay, 1, length), OutputHead(replay)
    scale = sum(found.blocks) / sum(found.blocks[i] for i in replay.chosen)
    with torch.no_grad():
        recording = replay.record(one.input_ids)
    through = functools.partial(
        curvature._through_blocks, replay, head, recording, one, "hessian", "sublayer"
    )
    try:
        with sdpa_kernel(SDPBackend.MATH):
            saved = int(_kept_bytes(replay, through) * scale / length)
        double = {
            kind: _curvature(replay, head, watch, one, kind, scale) / length
            for kind in curvature.KINDS
        }
    except (ArchitectureError, RuntimeError):
        return found
    return replace(found, curvature=double, saved_curvature=saved, noise=watch.noise)


def _curvature(
    replay: SomeBlocks,
    head: OutputHead,
    watch: Stopwatch,
    one: TokenSet,
    kind: str,
    scale: float,
) -> float:
    """Seconds of one sample's matrix over all blocks.

    A row costs one double backward pass through the blocks, whose number it grows with, and one
    through the head: two numbers of blocks give both terms.
    """
    counts = sorted({max(1, len(replay) // 2), len(replay)})
    blocks: list[float] = []
    heads: list[float] = []
    with torch.no_grad():
        recording = replay.record(one.input_ids)
    with sdpa_kernel(SDPBackend.MATH):
        once = watch.fastest(lambda: loss_gradient(recording, recording.entered, one, None, head))
        for count in counts:
            part = replay.first(count)
            with torch.no_grad():
                recording = part.record(one.input_ids)
            run = functools.partial(
                curvature._through_blocks, part, head, recording, one, kind, "sublayer"
            )
            _, _, tangents, stream = run()
            blocks.append(max(0.0, watch.fastest(run) - once))
            heads.append(
                watch.fastest(
                    functools.partial(
                        curvature._through_head,
                        *(recording, one, 0, stream[0], tangents[:, 0], kind),
                    )
                )
            )
    n = scale * len(replay)
    if len(counts) == 1:
        return once + blocks[0] * n**2 + heads[0] * n
    few, all_ = counts
    bent = max(0.0, (blocks[1] / all_ - blocks[0] / few) / (all_ - few))
    straight = max(0.0, blocks[1] / all_ - bent * all_)
    row = max(0.0, (heads[1] - heads[0]) / (all_ - few))
    first = max(0.0, heads[1] - row * all_)
    return once + straight * n + bent * n**2 + first + row * n


def _kept_bytes(replay: SomeBlocks, run: Callable[[], object]) -> int:
    """Bytes that the graphs of a backward pass keep, beside the weights."""
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in replay.model.parameters() if not p.is_meta}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        found = run()
    del found
    return sum(kept.values())


def _text(replay: Replay, rows: int, length: int) -> TokenSet:
    """Words drawn at random, so that routers of experts spread them as a text's."""
    words = int(text_config(replay.model).vocab_size)
    ids = torch.randint(0, words, (rows, length), generator=torch.Generator().manual_seed(0))
    return TokenSet(ids, torch.ones_like(ids, dtype=torch.bool), torch.arange(rows))


def _through(replay: Replay, recording: Recording) -> Tensor:
    stream = recording.entered
    for i in range(len(replay)):
        stream = recording.block(i, stream)
    return stream
