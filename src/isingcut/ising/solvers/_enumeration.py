"""Depth-first enumeration of a small subproblem with the Gilmore-Lawler bound.

Blocks are taken in a fixed order. If d of m blocks are chosen and the others must come from the
positions p and later, r = m - d are missing. The energy of every completion is at least the partial
energy plus the r smallest values of

    own term + couplings to the chosen + half the sum of the r - 1 smallest couplings to
    blocks from p on,

because each remaining pair is counted at both of its blocks (P. Gilmore 1962, E. Lawler 1963). The
half sums depend only on (p, block, r) and are tabulated once, so that a node costs O(N).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from isingcut.ising.states import Floats

compiled = njit(cache=True, nogil=True)
"""Decorator that compiles a function of numbers and arrays, to run in several threads."""


class Dense(NamedTuple):
    """A problem as arrays for compiled code: minimise h.x + sum_{i<j} J_ij x_i x_j, with
    m_low <= sum x <= m_high and rows low <= A x <= high."""

    h: Floats
    J: Floats
    A: Floats
    low: Floats
    high: Floats
    m_low: int
    m_high: int


class Heap(NamedTuple):
    """The k best states found, as a max-heap; places without a state have the energy inf.

    Equal states have equal ``keys``.
    """

    energies: Floats
    states: NDArray[np.uint8]
    keys: NDArray[np.uint64]

    @classmethod
    def empty(cls, k: int, n: int) -> Heap:
        """Return a heap for k states (N,)."""
        states = np.zeros((k, n), dtype=np.uint8)
        return cls(np.full(k, np.inf), states, np.zeros(k, dtype=np.uint64))


@compiled
def half_sums(J, m):  # type: ignore[no-untyped-def]
    """Return (N, N, m): at [p, j, r] half the sum of the r smallest J[j, k] over k >= p, k != j."""
    n = J.shape[0]
    table = np.zeros((n, n, m))
    ordered = np.zeros(n)
    for j in range(n):
        size = 0
        for p in range(n - 1, -1, -1):
            if p != j:
                value = J[j, p]
                q = size
                while q > 0 and ordered[q - 1] > value:
                    ordered[q] = ordered[q - 1]
                    q -= 1
                ordered[q] = value
                size += 1
            if p <= j:
                total = 0.0
                for r in range(1, min(m, size + 1)):
                    total += 0.5 * ordered[r - 1]
                    table[p, j, r] = total
    return table


@compiled
def _smallest(values, count, r):  # type: ignore[no-untyped-def]
    """Return the sum of the r smallest of values[:count], which are reordered."""
    low = 0
    high = count - 1
    while low < high:
        pivot = values[(low + high) >> 1]
        i = low
        j = high
        while i <= j:
            while values[i] < pivot:
                i += 1
            while values[j] > pivot:
                j -= 1
            if i <= j:
                values[i], values[j] = values[j], values[i]
                i += 1
                j -= 1
        if r - 1 <= j:
            high = j
        elif r - 1 >= i:
            low = i
        else:
            break
    total = 0.0
    for q in range(r):
        total += values[q]
    return total


@compiled
def sift_down(heap):  # type: ignore[no-untyped-def]
    """Restore a `Heap` after its first entry was replaced."""
    energies, states, keys = heap
    k = energies.shape[0]
    i = 0
    while True:
        child = 2 * i + 1
        if child >= k:
            return
        if child + 1 < k and energies[child + 1] > energies[child]:
            child += 1
        if energies[child] <= energies[i]:
            return
        energies[i], energies[child] = energies[child], energies[i]
        keys[i], keys[child] = keys[child], keys[i]
        for j in range(states.shape[1]):
            states[i, j], states[child, j] = states[child, j], states[i, j]
        i = child


@compiled
def reach(A):  # type: ignore[no-untyped-def]
    """Return the least and most, (R, N + 1) each, that the columns from i on can add to a row."""
    rows, n = A.shape
    least = np.zeros((rows, n + 1))
    most = np.zeros((rows, n + 1))
    for i in range(n - 1, -1, -1):
        least[:, i] = least[:, i + 1] + np.minimum(A[:, i], 0.0)
        most[:, i] = most[:, i + 1] + np.maximum(A[:, i], 0.0)
    return least, most


@compiled
def enumerate_below(problem, base, heap, threshold, stop, budget):  # type: ignore[no-untyped-def]
    """Collect the lowest states with energy below the threshold.

    Args:
        problem: `Dense` subproblem with blocks in the order of decision, and one number of ones,
            at least 1.
        base: energy of the fixed variables.
        heap: an empty `Heap`, filled with the states found.
        threshold: (1,) shared, other threads lower it; base + energy of a state must be below it.
        stop: (1,) shared flag.
        budget: most nodes to visit.

    Returns:
        whether the enumeration is complete, and the number of visited nodes.
    """
    h, J, A, low, high, m, _ = problem
    energies = heap.energies
    best = heap.states
    n = h.shape[0]
    rows = A.shape[0]
    table = half_sums(J, m)
    least, most = reach(A)
    chosen = np.zeros(m, dtype=np.int64)
    partial = np.zeros(m + 1)
    partial[0] = base
    marginal = np.zeros((m + 1, n))
    marginal[0] = h
    sums = np.zeros((m + 1, rows))
    values = np.zeros(n)
    limit = min(threshold[0], energies[0])
    nodes = 0
    depth = 0
    chosen[0] = -1
    while depth >= 0:
        nodes += 1
        if nodes & 1023 == 0:
            limit = min(threshold[0], energies[0])
            if stop[0]:
                return False, nodes
        if nodes > budget:
            return False, nodes
        chosen[depth] += 1
        p = chosen[depth]
        r = m - depth
        if p > n - r:
            depth -= 1
            continue
        if r == 1:
            room = limit - partial[depth]
            for i in range(p, n):
                if marginal[depth, i] < room:
                    fits = True
                    for q in range(rows):
                        value = sums[depth, q] + A[q, i]
                        fits &= low[q] <= value <= high[q]
                    if fits:
                        energies[0] = partial[depth] + marginal[depth, i]
                        # Each state is visited only once here, so its key is not needed.
                        best[0, :] = 0
                        for d in range(depth):
                            best[0, chosen[d]] = 1
                        best[0, i] = 1
                        sift_down(heap)
                        limit = min(threshold[0], energies[0])
                        room = limit - partial[depth]
            depth -= 1
            continue
        for j in range(p, n):
            values[j - p] = marginal[depth, j] + table[p, j, r - 1]
        if partial[depth] + _smallest(values, n - p, r) >= limit:
            depth -= 1
            continue
        fits = True
        for q in range(rows):
            fits &= sums[depth, q] + most[q, p] >= low[q]
            fits &= sums[depth, q] + least[q, p] <= high[q]
            sums[depth + 1, q] = sums[depth, q] + A[q, p]
        if not fits:
            depth -= 1
            continue
        partial[depth + 1] = partial[depth] + marginal[depth, p]
        for j in range(p + 1, n):
            marginal[depth + 1, j] = marginal[depth, j] + J[p, j]
        depth += 1
        chosen[depth] = p
    return True, nodes
