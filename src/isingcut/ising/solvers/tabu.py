"""Iterated tabu search with swap moves: the default heuristic.

A swap takes one block back and removes another, so the count never changes; where constraints
leave the count open, single flips are moves too. Other rows are a weighted violation whose
weight adapts until the search crosses the border of the feasible region now and then. The
scheme (tabu search, then perturbation of the best state, again and again) is that of
G. Palubeckis, "Iterated tabu search for the maximum diversity problem", Applied Mathematics and
Computation 189 (2007), with our own move evaluation and a pool of the best distinct states.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isingcut.errors import InputError
from isingcut.ising.problem import Problem
from isingcut.ising.solvers._reduced import Reduced, reduce
from isingcut.ising.solvers._swaps import tabu_walk
from isingcut.ising.solvers.base import Solution

__all__ = ["Tabu"]


@dataclass(frozen=True)
class Tabu:
    """Swap-move tabu search; returns the best distinct states it met, without a proof.

    The result depends on the seed and the options only, not on the machine's speed, unless
    ``seconds`` cuts the search short.

    Args:
        restarts: searches, one in four from a random state and the others from the best one
            perturbed; 0 chooses 8 + 1,600 / N.
        steps: moves per restart; 0 chooses 20 N + 500.
        seed: of every random choice.
        seconds: wall-clock limit, or None.
    """

    restarts: int = 0
    steps: int = 0
    seed: int = 0
    seconds: float | None = None

    def solve(self, problem: Problem, k: int) -> Solution:
        """Up to ``k`` of the best distinct states met."""
        if self.restarts < 0 or self.steps < 0:
            raise InputError("tabu needs restarts >= 0 and steps >= 0")
        reduced = reduce(problem)
        states, done = search(
            reduced, k, self.restarts, self.steps, self.seed, self.seconds, problem
        )
        return Solution(reduced.expand(states), None, False, {"restarts": done})


def search(
    reduced: Reduced,
    k: int,
    restarts: int,
    steps: int,
    seed: int,
    seconds: float | None,
    problem: Problem,
) -> tuple[NDArray[np.uint8], int]:
    """The pool of a tabu search, reduced states (S, V), and the restarts done."""
    n = reduced.n
    pool_energies = np.full(k, np.inf)
    pool = np.zeros((k, n), dtype=np.uint8)
    hashes = np.zeros(k, dtype=np.uint64)
    rng = np.random.default_rng(seed)
    keys = rng.integers(1, 2**63, size=max(n, 1), dtype=np.uint64)
    rows = reduced.A.shape[0] or reduced.exclusive.any()
    start = reduced.shrink(problem.a_state()[None])[0] if rows else None
    size = np.abs(reduced.A).max(axis=1, initial=0.0)
    A = reduced.A / size[:, None]
    low, high = reduced.low / size, reduced.high / size
    # No swap can outbid two variables that exclude each other.
    reach = float((np.abs(reduced.h) + np.abs(reduced.J).sum(axis=1)).max(initial=0.0)) or 1.0
    J = reduced.J + reach * reduced.exclusive
    exclusive = reduced.exclusive.astype(np.int64)
    steps = steps or 20 * n + 500
    restarts = restarts or 8 + 1600 // max(n, 1)
    began = time.perf_counter()
    done = 0
    for restart in range(restarts):
        x = np.zeros(n, dtype=np.uint8)
        best = int(np.argmin(pool_energies))
        if start is not None and restart == 0:
            x[:] = start
        elif restart % 4 and np.isfinite(pool_energies[best]):
            x[:] = pool[best]
            _perturb(x, rng)
        else:
            m = int(rng.integers(reduced.m_low, reduced.m_high + 1))
            x[rng.permutation(n)[:m]] = 1
        tabu_walk(
            reduced.h,
            J,
            exclusive,
            A,
            low,
            high,
            reduced.m_low,
            reduced.m_high,
            x,
            steps,
            int(rng.integers(2**31)),
            keys,
            pool_energies,
            pool,
            hashes,
        )
        done += 1
        if seconds is not None and time.perf_counter() - began > seconds:
            break
    return pool[np.isfinite(pool_energies)], done


def _perturb(x: NDArray[np.uint8], rng: np.random.Generator) -> None:
    ones, zeros = np.flatnonzero(x == 1), np.flatnonzero(x == 0)
    most = min(ones.size, zeros.size)
    if most:
        swaps = int(rng.integers(1, max(most // 2, 1) + 1))
        x[rng.permutation(ones)[:swaps]] = 0
        x[rng.permutation(zeros)[:swaps]] = 1
