"""What suits this machine, found by a short measurement: attention, threads and micro-batch.

All change a result by rounding only, but they change it: a run records what was chosen, in
`run.json`, and goes on with that when it is resumed. On a CPU `attention.py` beats PyTorch's fused
attention at short lengths; its memory grows with the square of the length, so that long samples
keep the fused one. Threads that share the work of a small model mostly wait for each other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from isingcut.errors import ArchitectureError
from isingcut.models.architectures import text_config
from isingcut.models.compute.attention import NAME, register
from isingcut.models.load import quiet_transformers
from isingcut.models.replay import Recording, Replay

BATCH_TOKENS = 1024

# Attention weights that are kept for a backward pass through all blocks.
_ATTENTION_MEMORY = 512_000_000
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

    def as_dict(self) -> dict[str, Any]:
        """For `run.json`."""
        return dataclasses.asdict(self)


def tune(
    replay: Replay,
    length: int,
    *,
    attention: str | None = None,
    batch_tokens: int | None = None,
    backward: bool = False,
    memory: int,
    seconds: Callable[[Callable[[], None]], float] | None = None,
) -> Tuning:
    """Choose what is not given, by timing a few of the model's blocks.

    The threads are never more than torch would take, and are left alone where the environment
    says how many (`OMP_NUM_THREADS`, `MKL_NUM_THREADS`).

    Args:
        replay: a model in memory.
        length: tokens of a sample.
        attention, batch_tokens: given, they are taken.
        backward: the work is gradients, so that attention is timed with its backward pass.
        memory: bytes that a micro-batch's gradients may take.
        seconds: times one call; a stop-watch by default.

    Complexity: `_ROUNDS` forward passes of `_BLOCKS` blocks per possibility.
    """
    seconds = seconds or _stopwatch(replay)
    loaded = _loaded(replay)
    probe = _probe_backward if backward else _probe
    pass_tokens = min(batch_tokens or BATCH_TOKENS, BATCH_TOKENS)
    threads = None
    if _threads_possible(replay, pass_tokens):
        threads = _threads(probe(replay, attention or loaded, pass_tokens, length), seconds)
    with few_threads(threads):
        if attention is None and _causal_possible(replay, length, batch_tokens or BATCH_TOKENS):
            probes = {name: probe(replay, name, BATCH_TOKENS, length) for name in (loaded, NAME)}
            took = _fastest(probes, seconds)
            if took[loaded] > _WORTH_SECONDS and took[loaded] > _GAIN * took[NAME]:
                attention = NAME
        if batch_tokens is None:
            batch_tokens = _batch(replay, attention or loaded, length, memory, seconds)
    return Tuning(attention, batch_tokens, threads)


@contextlib.contextmanager
def few_threads(most: int | None) -> Iterator[None]:
    """Compute with at most so many threads for a while; None changes nothing."""
    before = torch.get_num_threads()
    if most is None or most >= before:
        yield
        return
    torch.set_num_threads(most)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def chosen_attention(replay: Replay, name: str | None = None) -> Iterator[None]:
    """Let the model compute attention as ``name``, or as its replay was tuned to, for a while.

    Raises:
        ArchitectureError: the model has no such implementation.
    """
    before, wanted = _loaded(replay), name or replay.attention
    if wanted is None or wanted == before:
        yield
        return
    model: Any = replay.model
    reason = f"it computes it as {before!r}"
    try:
        # In the place of sdpa alone: models without that have something it cannot do.
        if wanted != NAME or before == "sdpa":
            register()
            with quiet_transformers():
                model.set_attn_implementation(wanted)
    except (ValueError, ImportError, AttributeError) as e:
        reason = " ".join(str(e).split())
    if _loaded(replay) != wanted:
        raise ArchitectureError(
            f"{type(model).__name__} cannot compute attention as {wanted!r} ({reason}); "
            "leave --attention out"
        )
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _loaded(replay: Replay) -> str | None:
    found = getattr(getattr(replay.model, "config", None), "_attn_implementation", None)
    return found if isinstance(found, str) else None


def _causal_possible(replay: Replay, length: int, batch_tokens: int) -> bool:
    """Whether `attention.py` is worth a try: on a CPU, and its weights are few."""
    if replay.device.type != "cpu" or _loaded(replay) != "sdpa":
        return False
    heads = getattr(text_config(replay.model), "num_attention_heads", None)
    if not isinstance(heads, int):
        return False
    rows = max(1, batch_tokens // length)
    weights = len(replay) * rows * heads * length**2
    if weights * _element(replay) > _ATTENTION_MEMORY:
        return False
    try:
        with chosen_attention(replay, NAME):
            return True
    except ArchitectureError:
        return False


def _threads_possible(replay: Replay, tokens: int) -> bool:
    """Whether fewer threads are worth a try: little work on a CPU, and nobody said how many."""
    said = any(os.environ.get(name) for name in _THREAD_VARIABLES)
    if said or replay.device.type != "cpu" or torch.get_num_threads() == 1:
        return False
    weights = sum(p.numel() for i in _some_blocks(replay) for p in replay.blocks[i].parameters())
    return 2.0 * weights * tokens <= _SMALL_WORK


def _threads(run: Callable[[], None], seconds: Callable[[Callable[[], None]], float]) -> int | None:
    """Fewer threads than there are, where a pass is clearly faster with them."""
    most = torch.get_num_threads()

    def limited(count: int) -> Callable[[], None]:
        def work() -> None:
            with few_threads(count):
                run()

        return work

    run()
    probes = {n: limited(n) for n in [2**k for k in range(most.bit_length()) if 2**k < most]}
    once = {n: seconds(probe) for n, probe in probes.items()}
    near = [n for n in probes if once[n] < 2 * min(once.values())]
    took = _fastest({n: probes[n] for n in near} | {most: limited(most)}, seconds)
    best = min(took, key=lambda count: (took[count], count))
    return best if took[most] > _GAIN * took[best] else None


def _probe(replay: Replay, name: str | None, tokens: int, length: int) -> Callable[[], None]:
    """A forward pass of some blocks, spread over the model."""
    recording, some = _recorded(replay, name, tokens, length), _some_blocks(replay)

    def run() -> None:
        with torch.inference_mode(), chosen_attention(replay, name):
            stream = recording.entered
            for i in some:
                stream = recording.block(i, stream)

    return run


def _probe_backward(
    replay: Replay, name: str | None, tokens: int, length: int
) -> Callable[[], None]:
    """The same blocks forward and backward."""
    recording, some = _recorded(replay, name, tokens, length), _some_blocks(replay)

    def run() -> None:
        with chosen_attention(replay, name):
            entered = recording.entered.detach().requires_grad_(True)
            left = _through(recording, some, entered)
            torch.autograd.grad(left, entered, torch.ones_like(left))

    return run


def _recorded(replay: Replay, name: str | None, tokens: int, length: int) -> Recording:
    rows = max(1, tokens // length)
    ids = torch.zeros((rows, length), dtype=torch.long, device=replay.device)
    with torch.no_grad(), chosen_attention(replay, name):
        return replay.record(ids)


def _some_blocks(replay: Replay) -> list[int]:
    n = len(replay)
    return sorted({round(k * (n - 1) / (_BLOCKS - 1)) for k in range(_BLOCKS)})


def _fastest(
    probes: dict[Any, Callable[[], None]], seconds: Callable[[Callable[[], None]], float]
) -> dict[Any, float]:
    """Shortest time of each, interleaved: other work on the machine only ever adds."""
    for run in probes.values():
        run()
    rounds = [{key: seconds(run) for key, run in probes.items()} for _ in range(_ROUNDS)]
    return {key: min(r[key] for r in rounds) for key in probes}


def _batch(
    replay: Replay,
    attention: str | None,
    length: int,
    memory: int,
    seconds: Callable[[Callable[[], None]], float],
) -> int:
    """Double the micro-batch as long as that pays and its gradients fit the memory."""
    # Measured losses keep the original's logits; gradients keep what they go back through.
    each = max(_saved_bytes(replay, attention, length), _logit_bytes(replay))
    most = memory // max(1, each)
    tokens = BATCH_TOKENS
    while 2 * tokens <= min(most, _MOST_TOKENS):
        probes = {k: _probe(replay, attention, k, length) for k in (tokens, 2 * tokens)}
        took = _fastest(probes, seconds)
        if took[tokens] < _WORTH_SECONDS and replay.device.type == "cpu":
            break
        if 2 * took[tokens] < _GAIN * took[2 * tokens]:
            break
        tokens *= 2
    return tokens


def _saved_bytes(replay: Replay, attention: str | None, length: int) -> int:
    """Bytes per token that a backward pass through all blocks keeps."""
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in replay.model.parameters()}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    # One sample.
    recording, some = _recorded(replay, attention, length, length), _some_blocks(replay)
    with (
        chosen_attention(replay, attention),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
    ):
        alive = _through(recording, some, recording.entered.detach().requires_grad_(True))
    del alive
    return sum(kept.values()) * len(replay) // (len(some) * length)


def _logit_bytes(replay: Replay) -> int:
    """Bytes of one position's logits."""
    config = text_config(replay.model)
    words = getattr(config, "vocab_size", None)
    return (words if isinstance(words, int) else 0) * _element(replay)


def _element(replay: Replay) -> int:
    return next(replay.model.parameters()).element_size()


def _through(recording: Recording, blocks: Sequence[int], stream: Tensor) -> Tensor:
    for i in blocks:
        stream = recording.block(i, stream)
    return stream


def _stopwatch(replay: Replay) -> Callable[[Callable[[], None]], float]:
    def seconds(run: Callable[[], None]) -> float:
        if replay.device.type == "cuda":
            torch.cuda.synchronize(replay.device)
        began = time.perf_counter()
        run()
        if replay.device.type == "cuda":
            torch.cuda.synchronize(replay.device)
        return time.perf_counter() - began

    return seconds
