"""How many micro-batches go through a block each time it is read."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from isingcut.models.streaming.buffers import Buffers

# Computing on a chunk shall take this many times the reading: in wall time, so that it hides
# behind the computing, and on a CPU in processor time too, which it takes from the computing.
_HIDDEN = 1.3
_SHARED = 25.0


class Pace:
    """Chunks just large enough that reading costs next to nothing, from what the last one took.

    A chunk is what a killed run loses, so it should not be larger. Results do not depend on it.

    Args:
        buffers: those that the model is read into.
    """

    def __init__(self, buffers: Buffers) -> None:
        self._buffers = buffers
        self.batches = 1

    @contextmanager
    def timed(self, batches: int) -> Iterator[None]:
        """Time a sweep of ``batches`` micro-batches, and set the size of the next chunk."""
        b = self._buffers
        began, stalled, reading, cpu = time.perf_counter(), b.stalled, b.reading, b.reading_cpu
        yield
        wall = time.perf_counter() - began
        each = max(1e-9, (wall - (b.stalled - stalled)) / batches)
        wanted = _HIDDEN * (b.reading - reading)
        if b.device.type == "cpu":
            wanted = max(wanted, _SHARED * (b.reading_cpu - cpu))
        self.batches = max(1, math.ceil(wanted / each))
