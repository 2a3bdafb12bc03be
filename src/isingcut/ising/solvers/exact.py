"""Exact branch and bound: the K best states with a proof.

Small nodes are enumerated depth first with a cheap combinatorial bound (`_enumeration`). For others
a semidefinite bound with triangle inequalities is computed (`_relaxation`). It starts from the
parent's multipliers and stops as soon as it exceeds the threshold. A variable is fixed if the bound
for its other value exceeds the threshold. All threads take nodes with the lowest bound first. The
search starts from the K states of a tabu search, which give a good first threshold.
"""

import heapq
import itertools
import math
import os
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import cache
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from isingcut.errors import InputError
from isingcut.ising.constraints import count
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.problem import Problem
from isingcut.ising.solvers._enumeration import Dense, Heap, enumerate_below
from isingcut.ising.solvers._relaxation import Dual, Relaxation, Subproblem, spin_matrix
from isingcut.ising.solvers.base import Reduced, Solution, propagate, reduce
from isingcut.ising.solvers.tabu import Tabu
from isingcut.ising.states import Floats

__all__ = ["Exact"]

# Most nodes of one enumeration, tuned on the families of benchmarks/solvers.py.
ROOT_BUDGET = 1_000_000
NODE_BUDGET = 60_000
ENUMERABLE = 3 * 10**10
"""Most states of a subproblem below the root for an enumeration, which seldom ends for more."""
OPEN_BYTES = 1.5e8
"""Memory for open nodes; beyond it, further nodes keep no multipliers."""


@dataclass(frozen=True)
class Exact:
    """Branch and bound with semidefinite bounds, which can be stopped at any time.

    At a limit, or on Ctrl-C, it returns the best states so far with the proven lower bound and
    ``proven=False``. The states of a complete search do not depend on timing, except among states
    tied with the K-th.

    Args:
        seconds: wall-clock limit, or None.
        nodes: limit on the nodes of the semidefinite tree, or None.
        threads: number of threads; 0 uses every core.
        seed: random seed of the initial tabu search.
    """

    seconds: float | None = None
    nodes: int | None = None
    threads: int = 0
    seed: int = 0

    def solve(self, problem: Problem, k: int) -> Solution:
        """Find the ``k`` lowest states, proven unless a limit was reached."""
        if self.threads < 0 or (self.seconds is not None and self.seconds <= 0):
            raise InputError("exact needs threads >= 0 and a time limit above 0")
        deadline = math.inf
        if self.seconds is not None:
            compile_search()
            deadline = time.perf_counter() + self.seconds
        reduced = reduce(problem)
        threads = self.threads or os.cpu_count() or 1
        search = _BranchAndBound(reduced, min(k, reduced.count_states()))
        search.warm_start(reduced, problem, self.seed)
        # The search threads use all cores; additional BLAS threads would only wait.
        with threadpool_limits(limits=1, user_api="blas"):
            search.run(threads, deadline, self.nodes)
        states = search.pool.states(reduced.n)
        energies = search.energies(states)
        # Every feasible state outside the pool has at least this energy.
        frontier = min((node.bound for node in search.open), default=np.inf)
        info = {
            "nodes": search.nodes,
            "enumerated": search.visited,
            "evaluations": search.relaxation.evaluations,
            "open_nodes": len(search.open),
            # The number of lowest states with a proven rank.
            "proven_states": int((energies <= frontier).sum()),
            "stopped": search.stopped,
            "threads": threads,
        }
        bound = min(frontier, energies.min(initial=np.inf))
        lower = bound * search.scale + reduced.c
        return Solution(reduced.expand(states), lower, search.stopped is None, info)


@cache
def compile_search() -> None:
    """Run every compiled function once, so that no time limit counts numba's first compilation."""
    problem = Problem(Hamiltonian(np.zeros(4), 1 - np.eye(4)), [count(4, 2)])
    reduced = reduce(problem)
    search = _BranchAndBound(reduced, 1)
    part = Subproblem(search.reduced, np.full(4, -1, dtype=np.int8), 2)
    search.relaxation.bound(part, None)
    search.warm_start(reduced, problem, 0)
    search._enumerate(part, True)


class _Pool:
    """The K best states so far, and the threshold for further states.

    ``threshold`` (1,) is an array that compiled code reads while other threads lower it. Only
    states with an energy below it can enter the pool.

    Args:
        k: number of states to keep.
        tolerance: difference below which energies count as equal.
    """

    def __init__(self, k: int, tolerance: float) -> None:
        self.k = k
        self.tolerance = tolerance
        self.threshold = np.array([np.inf])
        self._energies: dict[bytes, float] = {}
        self._lock = threading.Lock()

    def add(self, energies: Floats, states: NDArray[np.uint8]) -> None:
        """Add new states (S, V) with their energies (S,), and keep the K best."""
        with self._lock:
            for energy, state in zip(energies.tolist(), states, strict=True):
                self._energies.setdefault(state.tobytes(), energy)
            best = heapq.nsmallest(self.k, self._energies.items(), itemgetter(1))
            self._energies = dict(best)
            if len(best) == self.k:
                worst = best[-1][1] - self.tolerance
                self.threshold[0] = min(self.threshold[0], worst)

    def states(self, width: int) -> NDArray[np.uint8]:
        """Return the states (S, V)."""
        rows = [np.frombuffer(key, dtype=np.uint8) for key in self._energies]
        return np.array(rows, dtype=np.uint8).reshape(len(rows), width)


@dataclass(order=True)
class _Node:
    """A subproblem: ``fixed`` (V,) is 0, 1 or -1 (free), with ``m`` ones in total."""

    bound: float
    fixed: NDArray[np.int8] = field(compare=False)
    m: int = field(compare=False)
    dual: Dual | None = field(compare=False, default=None)
    serial: int = field(default_factory=itertools.count().__next__)


class _BranchAndBound:
    """The state shared by all threads; energies are without ``reduced.c``, divided by ``scale``."""

    def __init__(self, reduced: Reduced, k: int) -> None:
        self.k = k
        C = spin_matrix(reduced.h, reduced.J, 0.0)
        self.scale = float(np.abs(np.linalg.eigvalsh(C)).max()) or 1.0
        h = reduced.h / self.scale
        J = reduced.J / self.scale
        self.reduced = replace(reduced, h=h, J=J)
        size = float(np.abs(h).sum() + np.abs(J).sum() / 2)
        self.pool = _Pool(k, 1e-12 * size)
        self.stop = np.zeros(1, dtype=np.int64)
        self.stopped: str | None = None
        self.nodes = self.visited = 0
        self.relaxation = Relaxation(reduced, self.pool.threshold, self.stop)
        self.open: list[_Node] = []
        self._most_stored = int(
            OPEN_BYTES / (4.0 * (reduced.n + 1) ** 2 + 40 * 1500 + 2000)
        )

    def warm_start(self, r: Reduced, problem: Problem, seed: int) -> None:
        """Fill the pool by tabu search of ``problem``, and open one root per number of ones."""
        restarts = 20 if r.count_states() > 1_000_000 else 2
        # At most 1000 states, because tabu search compares with each; the enumeration adds others.
        heuristic = Tabu(restarts=restarts, seed=seed)
        states, _ = heuristic.search(r, min(self.k, 1000), problem)
        self.pool.add(self.energies(states), states)
        for m in range(r.m_low, r.m_high + 1):
            free = np.full(r.n, -1, dtype=np.int8)
            self._push(_Node(self._simple_bound(m), free, m))

    def energies(self, states: NDArray[np.uint8]) -> Floats:
        """Return the scaled energies (S,) of reduced states (S, V)."""
        x = states.astype(np.float64)
        r = self.reduced
        result: Floats = x @ r.h + 0.5 * ((x @ r.J) * x).sum(axis=1)
        return result

    def _simple_bound(self, m: int) -> float:
        if m == 0:
            return 0.0
        rest = self.reduced.J.copy()
        np.fill_diagonal(rest, np.inf)
        half = 0.5 * np.sort(rest, axis=1)[:, : m - 1].sum(axis=1)
        return float(np.sort(self.reduced.h + half)[:m].sum())

    def _push(self, node: _Node) -> None:
        if len(self.open) >= self._most_stored:
            node.dual = None
        heapq.heappush(self.open, node)

    def run(self, threads: int, deadline: float, nodes: int | None) -> None:
        """Run until the tree is empty or a limit is reached."""
        running: dict[Future[list[_Node] | None], _Node] = {}
        with ThreadPoolExecutor(threads) as workers:
            try:
                while True:
                    while self.open and len(running) < threads and not self.stopped:
                        if nodes is not None and self.nodes >= nodes:
                            self._halt("node limit")
                            break
                        node = heapq.heappop(self.open)
                        if node.bound < self.pool.threshold[0]:
                            self.nodes += 1
                            running[workers.submit(self._process, node)] = node
                    if not running:
                        return
                    left = deadline - time.perf_counter()
                    if left <= 0:
                        self._halt("time limit")
                    try:
                        done, _ = wait(
                            running, max(0.01, min(left, 0.2)), FIRST_COMPLETED
                        )
                    except KeyboardInterrupt:
                        self._halt("interrupted")
                        continue
                    for future in done:
                        node = running.pop(future)
                        children = future.result()
                        for child in [node] if children is None else children:
                            self._push(child)
            finally:
                self.stop[0] = 1

    def _halt(self, reason: str) -> None:
        self.stopped = self.stopped or reason
        self.stop[0] = 1

    # one node -----------------------------------------------------------------------------

    def _process(self, node: _Node) -> list[_Node] | None:
        """Return the children of a node, [] if it is closed, or None if stopped before the end."""
        fixed = node.fixed.copy()
        dual = node.dual
        bound = node.bound
        r = self.reduced
        matrix = np.vstack([np.ones(r.n), r.A])
        low = np.append(node.m - 0.5, r.low)
        high = np.append(node.m + 0.5, r.high)
        while True:
            if not propagate(matrix, low, high, fixed):
                return []
            part = Subproblem(r, fixed, node.m)
            free = part.free
            if not free.size:
                states = fixed[None].astype(np.uint8)
                self.pool.add(self.energies(states), states)
                return []
            if self._enumerate(part, free.size == r.n):
                return []
            if self.stop[0]:
                return None
            lower, splits, dual = self.relaxation.bound(part, dual)
            node.bound = bound = max(bound, lower)
            if self.stop[0]:
                return None
            threshold = float(self.pool.threshold[0])
            if bound >= threshold:
                return []
            down, up = splits
            forced_down = up >= threshold
            forced_up = down >= threshold
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
                children.append(_Node(lower, child, node.m, dual.restrict(child)))
            return children

    def _enumerate(self, part: Subproblem, root: bool) -> bool:
        """Enumerate a subproblem unless this often fails at its size; return whether it is done."""
        n = part.free.size
        left = part.left
        if not root and math.comb(n, left) > ENUMERABLE:
            return False
        # Costly blocks come first: states with them are ruled out early, and few others remain.
        cost = part.h + part.J.sum(axis=1) * (left / n) / 2
        order = np.argsort(-cost)
        heap = Heap.empty(self.k, n)
        problem = Dense(
            part.h[order],
            part.J[np.ix_(order, order)],
            np.ascontiguousarray(part.A[:, order]),
            part.low,
            part.high,
            left,
            left,
        )
        budget = ROOT_BUDGET if root else NODE_BUDGET
        complete, visited = enumerate_below(
            problem, part.base, heap, self.pool.threshold, self.stop, budget
        )
        self.visited += int(visited)
        below = np.isfinite(heap.energies)
        if below.any():
            states = np.tile((part.fixed == 1).astype(np.uint8), (int(below.sum()), 1))
            states[:, part.free[order]] = heap.states[below]
            self.pool.add(heap.energies[below], states)
        return bool(complete)
