"""Iterated tabu search with swap moves: the default heuristic.

A swap restores one block and removes another, so the count never changes; if the constraints leave
the count open, single flips are moves too. Violations of other rows are penalised, with a weight
that adapts so that the search sometimes leaves and re-enters the feasible region. The scheme
(tabu search, then perturbation of the best state, repeatedly) is that of
G. Palubeckis, "Iterated tabu search for the maximum diversity problem", Applied Mathematics and
Computation 189 (2007), with a different move evaluation and a pool of the best distinct states.
"""

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isingcut.errors import InputError
from isingcut.ising.problem import Problem
from isingcut.ising.solvers._enumeration import Dense, Heap, compiled, sift_down
from isingcut.ising.solvers.base import Reduced, Solution, reduce


@compiled
def _insert(x, energy, key, heap):  # type: ignore[no-untyped-def]
    """Put a state into a `Heap`; return False for a duplicate or too high energy."""
    energies, states, keys = heap
    if energy >= energies[0]:
        return False
    for i in range(energies.shape[0]):
        if keys[i] == key and np.isfinite(energies[i]):
            return False
    energies[0] = energy
    keys[0] = key
    states[0, :] = x
    sift_down(heap)
    return True


@compiled
def _next(random):  # type: ignore[no-untyped-def]
    """Return the next state of the 64-bit xorshift generator (G. Marsaglia, 2003)."""
    random ^= random << np.uint64(13)
    random ^= random >> np.uint64(7)
    random ^= random << np.uint64(17)
    return random


@compiled
def _violation(sums, low, high):  # type: ignore[no-untyped-def]
    total = 0.0
    for r in range(sums.shape[0]):
        if sums[r] < low[r]:
            total += low[r] - sums[r]
        elif sums[r] > high[r]:
            total += sums[r] - high[r]
    return total


@compiled
def tabu_walk(problem, x, steps, seed, keys, heap):  # type: ignore[no-untyped-def]
    """Run one tabu search of a `Dense` problem from ``x`` (changed in place), and add good states
    to a `Heap`. The key of a state is the exclusive or of the ``keys`` of its blocks.

    The last block stands for "no block": h, J, A and keys are 0 there; a swap with it is a flip.
    """
    h, J, A, low, high, m_low, m_high = problem
    n = h.shape[0] - 1
    rows = A.shape[0]
    random = np.uint64(2 * seed + 1)
    local = h.copy()
    energy = 0.0
    m = 0
    key = np.uint64(0)
    sums = np.zeros(rows)
    for i in range(n):
        if x[i]:
            energy += local[i]
            m += 1
            key ^= keys[i]
            # `local += J[i]` would rebind the name, which makes the whole search a tenth slower.
            for j in range(n):
                local[j] += J[i, j]
            for r in range(rows):
                sums[r] += A[r, i]
    # `energy` counts each pair once, because local[i] was read before later blocks were added.
    violation = _violation(sums, low, high)
    weight = 0.0
    if rows:
        for i in range(n):
            weight = max(weight, abs(local[i]))
    first_weight = weight
    # Blocks with equal columns: swapping them changes no row.
    kind = np.arange(n + 1)
    for i in range(n + 1):
        for j in range(i):
            if (A[:, i] == A[:, j]).all():
                kind[i] = kind[j]
                break
    tabu_until = np.zeros(n + 1, dtype=np.int64)
    ones = np.zeros(n + 1, dtype=np.int64)
    zeros = np.zeros(n + 1, dtype=np.int64)
    trial = np.zeros(rows)
    neighbour = x.copy()
    best_seen = np.inf
    for step in range(1, steps + 1):
        expand = False
        if violation == 0.0:
            expand = _insert(x, energy, key, heap)
            best_seen = min(best_seen, energy)
        ones[0] = zeros[0] = n
        n1 = np.int64(m < m_high)
        n0 = np.int64(m > m_low)
        for i in range(n):
            if x[i]:
                ones[n1] = i
                n1 += 1
            else:
                zeros[n0] = i
                n0 += 1
        best = np.inf
        best_out = n
        best_in = n
        ties = 0
        for a in range(n1):
            out = ones[a]
            for b in range(n0):
                into = zeros[b]
                if out == into:
                    continue
                delta = local[into] - local[out] - J[out, into]
                # No move can reduce the violation below 0.
                if not expand and delta - weight * violation > best:
                    continue
                change = violation
                if rows and kind[out] != kind[into]:
                    for r in range(rows):
                        trial[r] = sums[r] - A[r, out] + A[r, into]
                    change = _violation(trial, low, high)
                if expand and change == 0.0 and energy + delta < heap.energies[0]:
                    neighbour[out] = 0
                    neighbour[into] = 1
                    other = key ^ keys[out] ^ keys[into]
                    _insert(neighbour, energy + delta, other, heap)
                    neighbour[out] = 1
                    neighbour[into] = 0
                score = delta + weight * (change - violation)
                if score > best:
                    continue
                banned = max(tabu_until[out], tabu_until[into]) >= step
                if banned and not (
                    change == 0.0 and energy + delta < best_seen - 1e-12
                ):
                    continue
                if score == best:
                    ties += 1
                    random = _next(random)
                    if random % np.uint64(ties) != 0:
                        continue
                else:
                    ties = 1
                best = score
                best_out = out
                best_in = into
        if ties == 0:
            tabu_until[:] = 0
            continue
        tenure = min(n // 4, 8)
        for block, sign, least, most in (
            (best_out, -1, tenure, (n - m) // 2),
            (best_in, 1, tenure // 2, m // 2),
        ):
            if block == n:
                continue
            energy += sign * local[block]
            x[block] = neighbour[block] = sign > 0
            key ^= keys[block]
            m += sign
            for j in range(n):
                local[j] += sign * J[block, j]
            for r in range(rows):
                sums[r] += sign * A[r, block]
            random = _next(random)
            extra = np.int64(random >> np.uint64(60)) % 5
            tabu_until[block] = step + min(least + extra, most)
        if rows:
            violation = _violation(sums, low, high)
            weight *= 1.1 if violation > 0.0 else 0.97
            # A very small weight would grow back slowly, and keep the search infeasible for long.
            weight = min(max(weight, 0.05 * first_weight), 50.0 * first_weight)


__all__ = ["Tabu"]


@dataclass(frozen=True)
class Tabu:
    """Tabu search with swap moves for the best distinct states that it visits, without a proof.

    The result depends on the seed and the options only, not on the machine's speed, unless
    ``seconds`` ends the search early.

    Args:
        restarts: number of searches, one in four from a random state and the others from the best
            state after a perturbation; 0 chooses 8 + 1,600 / N.
        steps: moves per search; 0 chooses 20 N + 500.
        seed: random seed.
        seconds: wall-clock limit, or None.
    """

    restarts: int = 0
    steps: int = 0
    seed: int = 0
    seconds: float | None = None

    def solve(self, problem: Problem, k: int) -> Solution:
        """Find up to ``k`` of the best distinct states."""
        if self.restarts < 0 or self.steps < 0:
            raise InputError("tabu needs restarts >= 0 and steps >= 0")
        reduced = reduce(problem)
        states, done = self.search(reduced, k, problem)
        return Solution(reduced.expand(states), None, False, {"restarts": done})

    def search(
        self, reduced: Reduced, k: int, problem: Problem
    ) -> tuple[NDArray[np.uint8], int]:
        """Return the best reduced states (S, V) of all searches, and the number of searches."""
        n = reduced.n
        heap = Heap.empty(k, n + 1)
        rng = np.random.default_rng(self.seed)
        keys = rng.integers(1, 2**63, size=max(n, 1), dtype=np.uint64)
        keys = np.append(keys[:n], np.uint64(0))
        size = np.abs(reduced.A).max(axis=1, initial=0.0)
        # The search sees one more block, which stands for "no block".
        dense = Dense(
            np.append(reduced.h, 0.0),
            np.pad(reduced.J, (0, 1)),
            np.pad(reduced.A / size[:, None], ((0, 0), (0, 1))),
            reduced.low / size,
            reduced.high / size,
            reduced.m_low,
            reduced.m_high,
        )
        steps = self.steps or 20 * n + 500
        restarts = self.restarts or 8 + 1600 // max(n, 1)
        began = time.perf_counter()
        for restart in range(restarts):
            x = np.zeros(n + 1, dtype=np.uint8)
            best = int(np.argmin(heap.energies))
            if len(size) and restart == 0:
                x[:n] = problem.a_state()[np.argmax(reduced.lift, axis=1)]
            elif restart % 4 and np.isfinite(heap.energies[best]):
                x[:] = heap.states[best]
                _perturb(x[:n], rng)
            else:
                m = int(rng.integers(reduced.m_low, reduced.m_high + 1))
                x[rng.permutation(n)[:m]] = 1
            tabu_walk(dense, x, steps, int(rng.integers(2**31)), keys, heap)
            if self.seconds is not None and time.perf_counter() - began > self.seconds:
                break
        return heap.states[np.isfinite(heap.energies), :n], restart + 1


def _perturb(x: NDArray[np.uint8], rng: np.random.Generator) -> None:
    ones = np.flatnonzero(x == 1)
    zeros = np.flatnonzero(x == 0)
    most = min(ones.size, zeros.size)
    if most:
        swaps = int(rng.integers(1, max(most // 2, 1) + 1))
        x[rng.permutation(ones)[:swaps]] = 0
        x[rng.permutation(zeros)[:swaps]] = 1
