"""A few blocks of a model, without the rest of it."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from isingcut.models.architectures import find_stack, stack_modules
from isingcut.models.replay import Recording, Replay
from isingcut.models.streaming.plan import Copied
from isingcut.models.streaming.store import Store

_BLOCKS = 4
# More than one block of a kind is only wanted where blocks are small.
_ENOUGH_BYTES = 1 << 30


class SomeBlocks(Replay):
    """A few blocks of a model whose other blocks are not there.

    Args:
        model: the skeleton.
        store: its weights; those of the chosen blocks, the embedding and the head are kept.
        chosen: block numbers, ascending, the first of them 0.

    Attributes:
        chosen: their numbers.
        kinds: of each of the model's N blocks, what blocks of equal cost have in common.
    """

    def __init__(self, model: nn.Module, store: Store, chosen: Sequence[int]) -> None:
        every = stack_modules(model, find_stack(model))
        rest: list[Any] = [None]

        def learn(module: nn.Module, args: Any, output: Any) -> None:
            rest[0] = output[1:] if isinstance(output, tuple) else None

        def absent(*args: Any, **kwargs: Any) -> Any:
            stream = args[0] if args else kwargs["hidden_states"]
            return stream if rest[0] is None else (stream, *rest[0])

        handles = [every[i].register_forward_hook(learn) for i in chosen]
        for i, block in enumerate(every):
            if i not in chosen:
                # For good: every pass through the whole model goes by it.
                block.__dict__["forward"] = absent
        self._whole = Replay(model, every, device=store.device)
        for handle in handles:
            handle.remove()
        self.kinds = [store.like(i) for i in range(len(every))]
        self.chosen = list(chosen)
        self.model, self.device = model, store.device
        self.blocks = [every[i] for i in chosen]
        self.bytes_per_token = self._whole.bytes_per_token
        self.attention = self.threads = None

    def record(self, input_ids: Tensor) -> Recording:
        """As of the whole model, with the chosen blocks' calls only."""
        found = self._whole.record(input_ids)
        calls = [found._calls[i] for i in self.chosen]
        return Recording(self, found.input_ids, found.entered, calls)

    def tail(self, hidden: Tensor, input_ids: Tensor) -> Tensor:
        """Logits from the stream that leaves the blocks."""
        return self._whole.tail(hidden, input_ids)

    def first(self, count: int) -> SomeBlocks:
        """The same with fewer blocks."""
        other = copy.copy(self)
        other.chosen, other.blocks = self.chosen[:count], self.blocks[:count]
        return other


def choose(store: Store, count: int) -> list[int]:
    """The first block, one of every kind, and a few more spread over the model."""
    kinds: dict[Any, int] = {}
    for i in range(count):
        kinds.setdefault(store.like(i), i)
    chosen = {0, *kinds.values()}
    size = sum(store.size(i) for i in chosen)
    for k in range(1, _BLOCKS):
        i = round(k * (count - 1) / (_BLOCKS - 1))
        if len(chosen) < _BLOCKS and size + store.size(i) <= _ENOUGH_BYTES:
            size += store.size(i) if i not in chosen else 0
            chosen.add(i)
    return sorted(chosen)


def forget_cached(store: Store, blocks: Sequence[int]) -> None:
    """Take the blocks' bytes out of the system's cache: reading shall be timed from the disk."""
    if not hasattr(os, "posix_fadvise"):
        return
    for i in blocks:
        for step in store.reader.plans[i].steps:
            sources = [step.source] if isinstance(step, Copied) else [s for _, s in step.sources]
            for source in sources:
                with source.file.open("rb") as f:
                    os.posix_fadvise(f.fileno(), source.start, source.size, os.POSIX_FADV_DONTNEED)
