"""The tree of the exact search: the best states so far, open nodes, worker threads, limits."""

from __future__ import annotations

import heapq
import math
import threading
import time

import numpy as np
from numpy.typing import NDArray

from isingcut.ising.problem import Problem
from isingcut.ising.solvers import tabu
from isingcut.ising.solvers._reduced import Reduced, propagate
from isingcut.ising.solvers.branching.dfs import enumerate_below
from isingcut.ising.solvers.branching.relaxation import (
    LARGE,
    Node,
    Relaxation,
    Subproblem,
    spin_matrix,
)
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


# Nodes of one enumeration, tuned on the families of benchmarks/solvers.py.
ROOT_BUDGET = 1_000_000
NODE_BUDGET = 60_000


class Leaves:
    """Tries to enumerate subproblems, and remembers at which size that tends to succeed.

    Args:
        rows: the reduced problem, for its rows.
        k: how many states are wanted.
        pool: takes what is found.
        stop: (1,) shared flag.
    """

    def __init__(self, rows: Reduced, k: int, pool: Pool, stop: NDArray[np.int64]) -> None:
        self.rows = rows
        self.k = k
        self.pool = pool
        self.stop = stop
        self.visited = 0
        # Share of enumerations that finished within their budget, by log2 of the state count.
        self._luck: dict[int, float] = {}

    def settle(self, part: Subproblem, root: bool) -> bool:
        """Enumerate the subproblem; False if its budget ran out first."""
        n, left = part.free.size, part.left
        difficulty = round(4 * math.log2(math.comb(n, left)))
        luck = self._luck.get(difficulty, 1.0)
        if not root and luck < 0.15:
            self._luck[difficulty] = luck + 0.002
            return False
        r, h, J, base = self.rows, part.h, part.J, part.base
        # Costly blocks first: choosing one is soon refuted, and the cheap ones that remain
        # for the end are few.
        order = np.argsort(-(h + J.sum(axis=1) * (left / n) / 2))
        A = r.A[:, part.free[order]]
        shift = r.A @ (part.fixed == 1)
        low, high = r.low - shift, r.high - shift
        h, J = h[order], np.where(part.exclusive, np.inf, J)[np.ix_(order, order)]
        flip = 2 * left > n and not part.exclusive.any()
        if flip:
            # The same problem in x -> 1 - x has fewer ones to place.
            base += float(h.sum() + J.sum() / 2)
            h = -(h + J.sum(axis=1))
            total = A.sum(axis=1)
            A, low, high = -A, low - total, high - total
            order, h, J, A = order[::-1], h[::-1], J[::-1, ::-1], A[:, ::-1]
            left = n - left
        energies = np.full(self.k, np.inf)
        best = np.zeros((self.k, n), dtype=np.uint8)
        complete, visited = enumerate_below(
            np.ascontiguousarray(h),
            np.ascontiguousarray(J),
            np.ascontiguousarray(A),
            low,
            high,
            left,
            base,
            self.pool.threshold,
            self.stop,
            ROOT_BUDGET if root else NODE_BUDGET,
            energies,
            best,
        )
        self.visited += int(visited)
        if not root:
            self._luck[difficulty] = luck + 0.1 * (float(complete) - luck)
        found = np.isfinite(energies)
        if found.any():
            states = np.repeat((part.fixed == 1).astype(np.uint8)[None], int(found.sum()), axis=0)
            states[:, part.free[order]] = 1 - best[found] if flip else best[found]
            self.pool.add(energies[found], states)
        return bool(complete)


# A large root's bound is improved as long as a call closes this share of what is left (by the last
# five calls).
ROOT_GAIN = 0.005


class BranchAndBound:
    """State shared by the threads; all energies are divided by ``scale`` and lack ``reduced.c``."""

    def __init__(self, reduced: Reduced, k: int, seed: int, memory_mb: float) -> None:
        self.reduced = reduced
        self.k = k
        self.seed = seed
        n = reduced.n
        C = spin_matrix(reduced.h, reduced.J, 0.0)
        self.scale = float(np.abs(np.linalg.eigvalsh(C)).max()) or 1.0
        self.h, self.J = reduced.h / self.scale, reduced.J / self.scale
        size = float(np.abs(self.h).sum() + np.abs(self.J).sum() / 2)
        self.pool = Pool(k, 1e-12 * size, _grain(self.h, self.J))
        self.stop = np.zeros(1, dtype=np.int64)
        self.stopped: str | None = None
        self.nodes = 0
        self.leaves = Leaves(reduced, k, self.pool, self.stop)
        self.relaxation = Relaxation(reduced, self.pool.threshold, self.stop)
        self.most_stored = int(memory_mb * 1e6 / (4.0 * (n + 1) ** 2 + 15 * 1500 + 2000))
        self._open: list[Node] = []
        self._active: dict[int, float] = {}
        self._serial = 0
        self._wake = threading.Condition()
        self._failure: BaseException | None = None

    def warm_start(self, problem: Problem) -> None:
        """Fill the pool by tabu search and open one root per number of ones."""
        r = self.reduced
        restarts = 20 if r.count_states() > 1_000_000 else 2
        states, _ = tabu.search(r, self.k, restarts, 0, self.seed, None, problem)
        self.pool.add(self.energies(states), states)
        for m in range(r.m_low, r.m_high + 1):
            self._push(Node(self._simple_bound(m), 0, np.full(r.n, -1, dtype=np.int8), m))

    def energies(self, states: NDArray[np.uint8]) -> Floats:
        """Energies (S,) of reduced states (S, V), scaled."""
        x = states.astype(np.float64)
        result: Floats = x @ self.h + 0.5 * ((x @ self.J) * x).sum(axis=1)
        return result

    def _simple_bound(self, m: int) -> float:
        if m == 0:
            return 0.0
        rest = np.where(self.reduced.exclusive, np.inf, self.J)
        np.fill_diagonal(rest, np.inf)
        half = 0.5 * np.sort(rest, axis=1)[:, : m - 1].sum(axis=1)
        return float(np.sort(self.h + half)[:m].sum())

    # the tree -----------------------------------------------------------------------------

    def _push(self, node: Node) -> None:
        self._serial += 1
        node.serial = self._serial
        if len(self._open) >= self.most_stored:
            node.dual = None
        heapq.heappush(self._open, node)

    def open_nodes(self) -> int:
        """How many subproblems are not settled."""
        return len(self._open)

    def frontier(self) -> float:
        """Every feasible state that is not in the pool has at least this energy (scaled)."""
        return min((node.bound for node in self._open), default=np.inf)

    def run(self, threads: int, seconds: float | None, nodes: int | None) -> None:
        """Work until the tree is empty or a limit is reached."""
        began = time.perf_counter()
        workers = [
            threading.Thread(target=self._work, args=(nodes,), daemon=True) for _ in range(threads)
        ]
        try:
            for worker in workers:
                worker.start()
            while any(worker.is_alive() for worker in workers):
                left = None if seconds is None else seconds - (time.perf_counter() - began)
                if left is not None and left <= 0:
                    self._halt("time limit")
                    break
                with self._wake:
                    self._wake.wait(0.2 if left is None else min(left, 0.2))
        except KeyboardInterrupt:
            self._halt("interrupted")
        for worker in workers:
            worker.join()
        if self._failure is not None:
            raise self._failure

    def _halt(self, reason: str) -> None:
        with self._wake:
            self.stopped = self.stopped or reason
            self.stop[0] = 1
            self._wake.notify_all()

    def _work(self, limit: int | None) -> None:
        scratch = np.zeros((self.reduced.n + 1,) * 3, dtype=np.uint8)
        me = threading.get_ident()
        try:
            while True:
                with self._wake:
                    while not self._open and self._active and not self.stop[0]:
                        self._wake.wait(0.05)
                    if not self._open or self.stop[0]:
                        self._wake.notify_all()
                        return
                    node = heapq.heappop(self._open)
                    if node.bound >= self.pool.threshold[0]:
                        continue
                    if limit is not None and self.nodes >= limit:
                        heapq.heappush(self._open, node)
                        self.stopped = self.stopped or "node limit"
                        self.stop[0] = 1
                        return
                    self.nodes += 1
                    self._active[me] = node.bound
                children = self._process(node, scratch)
                with self._wake:
                    if self.stop[0] and children is None:
                        heapq.heappush(self._open, node)
                    for child in children or ():
                        self._push(child)
                    del self._active[me]
                    self._wake.notify_all()
        except BaseException as error:
            with self._wake:
                self._failure = self._failure or error
                self._active.pop(me, None)
                self.stop[0] = 1
                self._wake.notify_all()

    # one node -----------------------------------------------------------------------------

    def _process(self, node: Node, scratch: NDArray[np.uint8]) -> list[Node] | None:
        """The children of a node, none if it is settled; None if stopped before the end."""
        fixed, dual, bound = node.fixed.copy(), node.dual, node.bound
        while True:
            if not self._tighten(fixed, node.m):
                return []
            part = Subproblem.of(self.h, self.J, self.reduced.exclusive, fixed, node.m)
            free = part.free
            if not free.size:
                states = fixed[None].astype(np.uint8)
                self.pool.add(self.energies(states), states)
                return []
            root = free.size == self.reduced.n
            if self.leaves.settle(part, root):
                return []
            if self.stop[0]:
                return None
            dual = self.relaxation.start(dual, part, node.m)
            patient = root and free.size > LARGE
            climb = [bound]
            while len(climb) == 1 or (patient and self._worth_another(climb)):
                lower, splits, dual = self.relaxation.bound(part, node.m, dual, scratch)
                climb.append(max(climb[-1], lower))
            node.bound = bound = climb[-1]
            if self.stop[0]:
                return None
            threshold = float(self.pool.threshold[0])
            if bound >= threshold:
                return []
            down, up = splits
            forced_down, forced_up = up >= threshold, down >= threshold
            if (forced_down & forced_up).any():
                return []
            if forced_down.any() or forced_up.any():
                fixed[free[forced_down]] = 0
                fixed[free[forced_up]] = 1
                continue
            weak = np.minimum(up, down) - bound
            strong = np.maximum(up, down) - bound
            mean = dual.centre[0, 1:]
            score = np.maximum(weak, 0) + 0.2 * np.maximum(strong, 0)
            score = score / (score.max() or 1.0) + (1 - np.abs(mean))
            pick = int(np.argmax(score))
            children = []
            for value, estimate in ((0, down[pick]), (1, up[pick])):
                child = fixed.copy()
                child[free[pick]] = value
                lower = max(bound, float(estimate))
                children.append(Node(lower, 0, child, node.m, dual.restrict(child)))
            return children

    def _worth_another(self, climb: list[float]) -> bool:
        """Whether to go on with the root: what it leaves, every node below it has to climb."""
        left = float(self.pool.threshold[0]) - climb[-1]
        if self.stop[0] or left <= 0:
            return False
        return len(climb) < 6 or climb[-1] - climb[-6] > 5 * ROOT_GAIN * left

    def _tighten(self, fixed: NDArray[np.int8], m: int) -> bool:
        """Fix what count, rows and pairs force, in place; False if nothing is feasible."""
        r = self.reduced
        matrix = np.vstack([np.ones(r.n), r.A])
        low = np.concatenate([[m - 0.5], r.low])
        high = np.concatenate([[m + 0.5], r.high])
        while True:
            ones = fixed == 1
            banned = r.exclusive[ones].any(axis=0)
            if banned[ones].any():
                return False
            fixed[banned] = 0
            if not propagate(matrix, low, high, fixed):
                return False
            if np.array_equal(ones, fixed == 1):
                return True


def _grain(h: Floats, J: Floats) -> float:
    """The largest g of which all coefficients are small multiples, or 0 if there is none."""
    values = np.concatenate([np.abs(h), np.abs(J[np.triu_indices(h.size, 1)])])
    values = values[values > 1e-12 * values.max(initial=0.0)]
    if not values.size:
        return 0.0
    grain = float(values.min())
    ratio = values / grain
    whole = np.abs(ratio - np.round(ratio)).max() < 1e-9 and ratio.max() < 1e5
    return grain if whole else 0.0
