"""Blocks' graphs that are kept between the forward and the backward sweep where there is room.

A graph holds what backward needs, and with it the weights, which are gone by then: in the buffer
is another part. So a weight is not held but its place in the buffer, and looked up there when
the block has come back. What was computed is then not computed again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from isingcut.measure.gates import gated_block
from isingcut.models.replay import Recording
from isingcut.models.streaming.plan import Part
from isingcut.models.streaming.store import Store


@dataclass(frozen=True)
class _Weight:
    """A tensor in a part's buffer, by its place there."""

    part: Part
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class GatedBlock:
    """A block with its gates, ready for backward.

    Attributes:
        held: bytes of its graph, beside weights.
    """

    alpha: Tensor
    before: Tensor
    after: Tensor
    held: int = 0

    def backward(self, toward: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients in the gates (B,) and in the stream before the block, from that after it."""
        wanted = [self.alpha, *([self.before] if self.before.requires_grad else [])]
        gradients = torch.autograd.grad(self.after, wanted, toward)
        return gradients[0], gradients[-1]


def gated(recording: Recording, block: int, before: Tensor, gate: str) -> GatedBlock:
    """Run a block that is installed, for a backward pass while it still is."""
    alpha = torch.ones(len(before), device=before.device, requires_grad=True)
    # In memory too, nothing that enters the first block requires a gradient.
    before = before.detach().requires_grad_(block > 0)
    return GatedBlock(alpha, before, gated_block(recording, block, before, alpha, gate, ones=True))


class Graphs:
    """Keeps graphs of the last blocks of a forward sweep, as many as there is room for.

    Args:
        store: the weights.
        room: bytes they may take.
        guess: bytes of one graph, until one was made.
    """

    def __init__(self, store: Store, room: int, guess: int) -> None:
        self._store, self._room, self._each = store, room, guess
        self._measured = False
        self._kept: dict[tuple[int, int], GatedBlock] = {}

    def has_room(self, left: int) -> bool:
        """Whether all of ``left`` graphs, this one and those to come, may be kept."""
        return left * self._each <= self._room

    def run(
        self, recording: Recording, block: int, batch: int, before: Tensor, gate: str
    ) -> Tensor:
        """Run a block and keep its graph; the stream (B, T, D) after it."""
        store, held, seen = self._store, 0, set[int]()

        def pack(value: Tensor) -> Any:
            nonlocal held
            storage = value.untyped_storage()
            if store.in_buffer(storage, block):
                shape, offset = tuple(value.shape), int(value.storage_offset())
                return _Weight(block, value.dtype, shape, value.stride(), offset)
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                held += storage.nbytes()
            return value

        def unpack(packed: Any) -> Tensor:
            if not isinstance(packed, _Weight):
                value: Tensor = packed
                return value
            empty = torch.empty(0, dtype=packed.dtype, device=store.device)
            storage = store.buffer_of(packed.part)
            with torch.no_grad():
                return empty.set_(storage, packed.offset, packed.size, packed.stride)

        with saved_tensors_hooks(pack, unpack):
            done = gated(recording, block, before, gate)
        self._kept[block, batch] = GatedBlock(done.alpha, done.before, done.after, held)
        self._each = max(self._each, held) if self._measured else held
        self._measured = True
        self._room -= held
        return done.after.detach()

    def take(self, block: int, batch: int) -> GatedBlock | None:
        """The graph of a block, which is installed again; None if it was not kept."""
        kept = self._kept.pop((block, batch), None)
        if kept is not None:
            self._room += kept.held
        return kept
