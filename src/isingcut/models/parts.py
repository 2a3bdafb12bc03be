"""The parts that a sweep over a model opens, and the store of a model in memory.

A *part* is a block, the input embedding or the output head. A model that is read from disk has a
store that holds two of them at a time (`streaming.store`); here is the store of a model whose
parts are always open, so that whoever sweeps over a model need not ask which of the two it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

Part = int | str
EMBED, HEAD = "embed", "head"

# What a block holds beside its input while it computes, in residual streams: queries, keys and
# values, an MLP four times as wide three times over, float32 norms, and all of it for backward.
BLOCK_STREAMS = 64


@dataclass
class Held:
    """Bytes that a graph keeps beside weights; counted while it is recorded."""

    size: int = 0


@dataclass(frozen=True)
class Seconds:
    """Time spent so far on reading parts.

    Attributes:
        stalled: computing has waited for a part.
        reading: a thread has read.
        shared: of these, on the processor that also computes.
    """

    stalled: float = 0.0
    reading: float = 0.0
    shared: float = 0.0


class Weights(Protocol):
    """The weights of a model."""

    def sweep(self, order: Sequence[Part]) -> Iterator[Part]:
        """Open parts in this order, each for one turn of the loop."""

    def lasting_graph(self, block: int) -> contextlib.AbstractContextManager[Held]:
        """Meanwhile, record a graph of an open block that goes back when it is open again."""

    def seconds(self) -> Seconds:
        """Time spent on reading so far."""


class Resident:
    """The weights of a model in memory: opening a part costs nothing."""

    def sweep(self, order: Sequence[Part]) -> Iterator[Part]:
        """The parts, one after the other."""
        return iter(order)

    @contextlib.contextmanager
    def lasting_graph(self, block: int) -> Iterator[Held]:
        """Nothing to do: the weights stay where the graph finds them, and memory is not watched."""
        yield Held()

    def seconds(self) -> Seconds:
        """None."""
        return Seconds()
