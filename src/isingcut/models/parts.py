"""The parts that a sweep over a model opens, and the store of a model in memory.

A *part* is a block, the input embedding or the output head. A model that is read from disk has a
store that holds two of them at a time (`streaming.store`); here is the store of a model whose
parts are always open, so that whoever sweeps over a model need not ask which of the two it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

Part = int | str
EMBED, HEAD = "embed", "head"

# What a block holds beside its input while it computes, in residual streams: queries, keys and
# values, an MLP four times as wide three times over, float32 norms, and all of it for backward.
BLOCK_STREAMS = 64


@dataclass(frozen=True)
class Reading:
    """How often a streamed model was read, in sweeps over all of its weights.

    Attributes:
        disk: from the checkpoint.
        memory: from parts that host memory keeps.
    """

    disk: float = 0.0
    memory: float = 0.0

    @property
    def sweeps(self) -> float:
        """From anywhere."""
        return self.disk + self.memory

    def __sub__(self, before: Reading) -> Reading:
        return Reading(self.disk - before.disk, self.memory - before.memory)


class Weights(Protocol):
    """The weights of a model."""

    @property
    def in_place(self) -> bool:
        """Whether every part is used where it stays: opening costs nothing, graphs may hold it."""

    def sweep(self, order: Sequence[Part]) -> Iterator[Part]:
        """Open parts in this order, each for one turn of the loop."""

    def reading(self) -> Reading:
        """How often the weights were read so far."""


class Resident:
    """The weights of a model in memory: opening a part costs nothing."""

    in_place = True

    def sweep(self, order: Sequence[Part]) -> Iterator[Part]:
        """The parts, one after the other."""
        return iter(order)

    def reading(self) -> Reading:
        """Never."""
        return Reading()
