"""The K best distinct states found so far, shared by threads and read by compiled kernels."""

from __future__ import annotations

import heapq
import threading

import numpy as np
from numpy.typing import NDArray

from isingcut.ising.states import Floats


class Pool:
    """K best states with a falling threshold.

    ``threshold`` (1,) is an array that compiled code reads while other threads lower it: only
    states with an energy below it are still wanted.

    Args:
        k: how many states.
        tolerance: energies closer than this count as equal.
        grain: all energies differ by multiples of it (0: no such grain is known).
    """

    def __init__(self, k: int, tolerance: float, grain: float) -> None:
        self.k = k
        self.step = max(tolerance, grain - tolerance)
        self.threshold = np.array([np.inf])
        self._heap: list[tuple[float, bytes]] = []
        self._known: set[bytes] = set()
        self._lock = threading.Lock()

    def add(self, energies: Floats, states: NDArray[np.uint8]) -> None:
        """Merge states (S, V) with their energies."""
        with self._lock:
            for energy, state in zip(energies.tolist(), states, strict=True):
                key = state.tobytes()
                if key in self._known:
                    continue
                if len(self._heap) < self.k:
                    heapq.heappush(self._heap, (-energy, key))
                elif energy < -self._heap[0][0]:
                    _, gone = heapq.heapreplace(self._heap, (-energy, key))
                    self._known.discard(gone)
                else:
                    continue
                self._known.add(key)
            if len(self._heap) == self.k:
                self.threshold[0] = min(self.threshold[0], -self._heap[0][0] - self.step)

    @property
    def best(self) -> float:
        """Lowest energy so far, or infinity."""
        return min((-energy for energy, _ in self._heap), default=np.inf)

    def states(self, width: int) -> NDArray[np.uint8]:
        """The states (S, V)."""
        rows = [np.frombuffer(key, dtype=np.uint8) for _, key in self._heap]
        return np.array(rows, dtype=np.uint8).reshape(len(rows), width)
