"""What suits this machine, found by a short measurement: threads and micro-batch.

Both change a result by rounding only, but they change it: a run records what was chosen, in
`run.json`, and goes on with that when it is resumed. Threads that share the work of a small model
mostly wait for each other.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isingcut.models.architectures.blocks import text_config
from isingcut.models.device import few_threads, synchronise
from isingcut.models.replay import Recording, Replay, chosen_attention
from isingcut.options.config import BATCH_TOKENS

# A choice must win this much: less is noise, and the default needs no explanation.
_GAIN = 1.05
# Models that are through in less have nothing to win.
_WORTH_SECONDS = 0.02
_MOST_TOKENS = 1 << 16
_ROUNDS = 5
_BLOCKS = 4
# A pass of more operations is mostly large matrix products, which threads share well; one of so
# many takes one thread a second or two.
_SMALL_WORK = 1e11
# Either says how many threads there are to be.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


_Timer = Callable[[Callable[[], None]], float]


@dataclass(frozen=True)
class Tuning:
    """How measurements are computed.

    Attributes:
        attention: transformers' name of the implementation; None keeps the loaded one.
        batch_tokens: tokens computed at a time.
        threads: fewer threads than torch takes by itself, where that is faster; None keeps those.
    """

    attention: str | None = None
    batch_tokens: int = BATCH_TOKENS
    threads: int | None = None


def tune(
    replay: Replay,
    length: int,
    *,
    attention: str | None = None,
    batch_tokens: int | None = None,
    memory: int,
    seconds: _Timer | None = None,
) -> Tuning:
    """Choose what is not given, by timing a few of the model's blocks.

    The threads are never more than torch would take, and are left alone where the environment
    says how many (`OMP_NUM_THREADS`, `MKL_NUM_THREADS`).

    Args:
        replay: a model in memory.
        length: tokens of a sample.
        attention: transformers' name of it; None keeps the loaded one.
        batch_tokens: given, it is taken.
        memory: bytes that a micro-batch's gradients may take.
        seconds: times one call; a stop-watch by default.

    Complexity: `_ROUNDS` forward passes of `_BLOCKS` blocks per possibility.
    """
    seconds = seconds or _stopwatch(replay)
    pass_tokens = min(batch_tokens or BATCH_TOKENS, BATCH_TOKENS)
    threads = None
    with chosen_attention(replay, attention):
        if _threads_possible(replay, pass_tokens):
            threads = _threads(_probe(replay, pass_tokens, length), seconds)
        if batch_tokens is None:
            with few_threads(threads):
                batch_tokens = _batch(replay, length, memory, seconds)
    return Tuning(attention, batch_tokens, threads)


def _threads_possible(replay: Replay, tokens: int) -> bool:
    """Whether fewer threads are worth a try: little work on a CPU, and nobody said how many."""
    said = any(os.environ.get(name) for name in _THREAD_VARIABLES)
    if said or replay.device.type != "cpu" or torch.get_num_threads() == 1:
        return False
    weights = sum(p.numel() for i in _some_blocks(replay) for p in replay.blocks[i].parameters())
    return 2.0 * weights * tokens <= _SMALL_WORK


def _threads(run: Callable[[], None], seconds: _Timer) -> int | None:
    """Half the threads as long as that is no slower; None where it does not clearly win."""

    def limited(count: int) -> Callable[[], None]:
        def work() -> None:
            with few_threads(count):
                run()

        return work

    most = count = torch.get_num_threads()
    slow = quick = 0.0
    while count > 1:
        took = _fastest({n: limited(n) for n in (count, count // 2)}, seconds)
        slow = slow or took[most]
        if took[count // 2] > took[count]:
            break
        count //= 2
        quick = took[count]
    return count if count < most and slow > _GAIN * quick else None


def _probe(replay: Replay, tokens: int, length: int) -> Callable[[], None]:
    """A pass through some blocks, spread over the model."""
    recording, some = _recorded(replay, tokens, length), _some_blocks(replay)

    def run() -> None:
        with torch.inference_mode():
            _through(recording, some, recording.entered)

    return run


def _recorded(replay: Replay, tokens: int, length: int) -> Recording:
    rows = max(1, tokens // length)
    ids = torch.zeros((rows, length), dtype=torch.long, device=replay.device)
    with torch.no_grad():
        return replay.record(ids)


def _some_blocks(replay: Replay) -> list[int]:
    n = len(replay)
    return sorted({round(k * (n - 1) / (_BLOCKS - 1)) for k in range(_BLOCKS)})


def _fastest(probes: dict[Any, Callable[[], None]], seconds: _Timer) -> dict[Any, float]:
    """Shortest time of each, interleaved: other work on the machine only ever adds."""
    for run in probes.values():
        run()
    rounds = [{key: seconds(run) for key, run in probes.items()} for _ in range(_ROUNDS)]
    return {key: min(r[key] for r in rounds) for key in probes}


def _batch(replay: Replay, length: int, memory: int, seconds: _Timer) -> int:
    """Double the micro-batch as long as that pays and its gradients fit the memory."""
    # Measured losses keep the original's logits; gradients keep what they go back through.
    words = getattr(text_config(replay.model), "vocab_size", None)
    logits = (words if isinstance(words, int) else 0) * next(
        replay.model.parameters()
    ).element_size()
    each = max(_saved_bytes(replay, length), logits)
    most = memory // max(1, each)
    tokens = BATCH_TOKENS
    while 2 * tokens <= min(most, _MOST_TOKENS):
        probes = {k: _probe(replay, k, length) for k in (tokens, 2 * tokens)}
        took = _fastest(probes, seconds)
        if took[tokens] < _WORTH_SECONDS and replay.device.type == "cpu":
            break
        if 2 * took[tokens] < _GAIN * took[2 * tokens]:
            break
        tokens *= 2
    return tokens


def _saved_bytes(replay: Replay, length: int) -> int:
    """Bytes per token that a backward pass through all blocks keeps."""
    # One sample.
    recording, some = _recorded(replay, length, length), _some_blocks(replay)
    entered = recording.entered.detach().requires_grad_(True)
    saved = kept_bytes(replay.model, lambda: _through(recording, some, entered))
    return saved * len(replay) // (len(some) * length)


def kept_bytes(model: nn.Module, run: Callable[[], object]) -> int:
    """Return the bytes that the graphs of a call keep for backward, without the model's weights."""
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters() if not p.is_meta}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        # An output of its own would hold the graph that holds it, for good.
        return x.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        alive = run()
    del alive
    return sum(kept.values())


def _through(recording: Recording, blocks: Sequence[int], stream: Tensor) -> Tensor:
    for i in blocks:
        stream = recording.block(i, stream)
    return stream


def _stopwatch(replay: Replay) -> _Timer:
    def seconds(run: Callable[[], None]) -> float:
        synchronise(replay.device)
        began = time.perf_counter()
        run()
        synchronise(replay.device)
        return time.perf_counter() - began

    return seconds
