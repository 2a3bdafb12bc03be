"""How many micro-batches go through a block each time it is opened."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from isingcut.data.tokens import TokenSet
from isingcut.models.parts import Weights
from isingcut.models.replay import Replay

# Computing on a chunk shall take this many times the reading: in wall time, so that it hides
# behind the computing, and on a CPU in processor time too, which it takes from the computing.
_HIDDEN = 1.3
_SHARED = 25.0


class Pace:
    """Chunks just large enough that reading costs next to nothing, from what the last one took.

    A chunk is what a killed run loses, so it should not be larger: of a model in memory, which is
    not read, it is one micro-batch. Results do not depend on it.

    Args:
        store: the weights that are read.
    """

    def __init__(self, store: Weights) -> None:
        self._store = store
        self.batches = 1

    def chunks(
        self, replay: Replay, batches: Sequence[TokenSet], streams: int
    ) -> Iterator[tuple[slice, int]]:
        """Part micro-batches into chunks that hide the reading and fit the memory allowed.

        Args:
            streams: residual streams of each micro-batch that are kept at a time.

        Yields:
            the places of a chunk, and the bytes that are allowed for its streams. What is done
            with it before the next one is asked for is timed.

        Raises:
            InputError: the model and one micro-batch's own work leave no memory.
        """
        first = 0
        while first < len(batches):
            room = replay.room(batches[first])
            most = batches[first : first + self.batches]
            costs = np.cumsum([streams * replay.stream_bytes(batch) for batch in most])
            count = max(1, int((costs <= room).sum()))
            with self.timed(count):
                yield slice(first, first + count), room
            first += count

    @contextmanager
    def timed(self, batches: int) -> Iterator[None]:
        """Time a sweep of ``batches`` micro-batches, and set the size of the next chunk."""
        began, before = time.perf_counter(), self._store.seconds()
        yield
        wall, after = time.perf_counter() - began, self._store.seconds()
        each = max(1e-9, (wall - (after.stalled - before.stalled)) / batches)
        wanted = max(
            _HIDDEN * (after.reading - before.reading), _SHARED * (after.shared - before.shared)
        )
        self.batches = max(1, math.ceil(wanted / each))
