"""The tree of the exact search: open nodes, worker threads, limits."""

from __future__ import annotations

import heapq
import math
import threading
import time

import numpy as np
from numpy.typing import NDArray

from isingcut.problem import Problem
from isingcut.solvers import _dfs, _sdp, tabu
from isingcut.solvers._node import Dual, Node, independent, spin_matrix
from isingcut.solvers._pool import Pool
from isingcut.solvers._reduced import Floats, Reduced, propagate

# Tuned on the generated families of benchmarks/solvers.py.
SIGMA = 0.01
ROUNDS = 12
ITERATIONS = 20
CUTS_PER_ROUND = 400
CAPACITY = 6000
GIVE_UP = 0.12
ROOT_BUDGET = 1_000_000
NODE_BUDGET = 60_000


class Search:
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
        equal = reduced.high - reduced.low <= 4e-9 * np.maximum(
            1.0, np.abs(reduced.A).sum(axis=1, initial=0.0)
        )
        self.equal = equal
        self.stop = np.zeros(1, dtype=np.int64)
        self.stopped: str | None = None
        self.nodes = self.enumerated = self.evaluations = 0
        self.most_stored = int(memory_mb * 1e6 / (4.0 * (n + 1) ** 2 + 15 * 1500 + 2000))
        self._open: list[Node] = []
        self._active: dict[int, float] = {}
        self._serial = 0
        self._root_dual: dict[int, Dual] = {}
        # Share of enumerations that finished within their budget, by log2 of the state count.
        self._luck = np.ones(4096)
        self._wake = threading.Condition()
        self._failure: BaseException | None = None

    def warm_start(self, problem: Problem) -> None:
        """Fill the pool by tabu search and open one root per number of ones."""
        r = self.reduced
        _, states, _ = tabu.search(r, self.k, 20, 0, self.seed, None, problem)
        self.pool.add(self._energies(states), states)
        for m in range(r.m_low, r.m_high + 1):
            self._push(Node(self._simple_bound(m), 0, np.full(r.n, -1, dtype=np.int8), m))

    def _energies(self, states: NDArray[np.uint8]) -> Floats:
        x = states.astype(np.float64)
        energies: Floats = x @ self.h + 0.5 * ((x @ self.J) * x).sum(axis=1)
        return energies

    def _simple_bound(self, m: int) -> float:
        if m == 0:
            return 0.0
        rest = self.J + np.diag(np.full(self.reduced.n, np.inf))
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

    def lower_bound(self) -> float:
        """Proven lower bound on the ground state (scaled)."""
        bounds = [node.bound for node in self._open] + list(self._active.values())
        return min([*bounds, self.pool.best])

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
        first = True
        while True:
            if not self._tighten(fixed, node.m):
                return []
            free = np.flatnonzero(fixed < 0)
            if not free.size:
                self._offer(fixed[None].astype(np.uint8), node.m)
                return []
            ones = fixed == 1
            h = self.h[free] + self.J[np.ix_(free, ones)].sum(axis=1)
            J = self.J[np.ix_(free, free)]
            base = float(self.h[ones].sum() + self.J[np.ix_(ones, ones)].sum() / 2)
            left = node.m - int(ones.sum())
            if self._enumerate(fixed, free, h, J, base, left, root=node.dual is None):
                return []
            if self.stop[0]:
                return None
            dual = self._start_dual(dual, fixed, free, node.m)
            got = self._bound(h, J, base, fixed, free, left, dual, scratch, first)
            if self.stop[0]:
                return None
            lower, splits, dual = got
            bound = max(bound, lower)
            if node.m not in self._root_dual:
                self._root_dual[node.m] = dual
            threshold = float(self.pool.threshold[0])
            if bound >= threshold:
                return []
            up, down = splits[1, 1:], splits[0, 1:]
            forced_down, forced_up = up >= threshold, down >= threshold
            if (forced_down & forced_up).any():
                return []
            first = False
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

    def _tighten(self, fixed: NDArray[np.int8], m: int) -> bool:
        """Fix what count and rows force, in place; False if nothing is feasible."""
        r = self.reduced
        ones, free = int((fixed == 1).sum()), int((fixed < 0).sum())
        if not ones <= m <= ones + free:
            return False
        if r.A.shape[0]:
            matrix = np.vstack([np.ones(r.n), r.A])
            low = np.concatenate([[m - 0.5], r.low])
            high = np.concatenate([[m + 0.5], r.high])
            if not propagate(matrix, low, high, fixed):
                return False
            ones, free = int((fixed == 1).sum()), int((fixed < 0).sum())
        if ones == m:
            fixed[fixed < 0] = 0
        elif ones + free == m:
            fixed[fixed < 0] = 1
        else:
            return True
        if r.A.shape[0]:
            value = r.A @ (fixed == 1)
            return bool(((value >= r.low) & (value <= r.high)).all())
        return True

    def _offer(self, states: NDArray[np.uint8], m: int) -> None:
        self.pool.add(self._energies(states), states)

    def _enumerate(
        self,
        fixed: NDArray[np.int8],
        free: NDArray[np.int64],
        h: Floats,
        J: Floats,
        base: float,
        left: int,
        root: bool,
    ) -> bool:
        """Settle the node by depth-first enumeration if a small budget allows it."""
        n = free.size
        difficulty = round(4 * math.log2(math.comb(n, left)))
        if not root and self._luck[difficulty] < 0.15:
            self._luck[difficulty] += 0.002
            return False
        order = np.argsort(-(h + J.sum(axis=1) * (left / n) / 2))
        r = self.reduced
        A = r.A[:, free[order]]
        shift = r.A @ (fixed == 1)
        low, high = r.low - shift, r.high - shift
        h, J = h[order], np.ascontiguousarray(J[np.ix_(order, order)])
        flip = 2 * left > n
        if flip:
            base += float(h.sum() + J.sum() / 2)
            h = -(h + J.sum(axis=1))
            total = A.sum(axis=1)
            A, low, high = -A, low - total, high - total
            order = order[::-1]
            h, J, A = h[::-1], np.ascontiguousarray(J[::-1, ::-1]), A[:, ::-1]
            left = n - left
        energies = np.full(self.k, np.inf)
        best = np.zeros((self.k, n), dtype=np.uint8)
        complete, visited = _dfs.enumerate_below(
            np.ascontiguousarray(h),
            J,
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
        self.enumerated += int(visited)
        if not root:
            self._luck[difficulty] += 0.1 * (float(complete) - self._luck[difficulty])
        found = np.isfinite(energies)
        if found.any():
            states = np.repeat((fixed == 1).astype(np.uint8)[None], int(found.sum()), axis=0)
            states[:, free[order]] = 1 - best[found] if flip else best[found]
            self.pool.add(self._energies(states), states)
        return bool(complete)

    def _start_dual(
        self, dual: Dual | None, fixed: NDArray[np.int8], free: NDArray[np.int64], m: int
    ) -> Dual:
        if dual is None:
            dual = self._root_dual.get(m)
        if dual is None:
            size = free.size + 1
            return Dual(
                free,
                np.zeros(size),
                np.zeros(2 * self.reduced.A.shape[0]),
                np.zeros(0),
                np.zeros((0, 3), dtype=np.int16),
                np.zeros(0, dtype=np.int8),
                np.zeros((size, size), dtype=np.float32),
            )
        return dual if dual.free.size == free.size else dual.restrict(fixed)

    def _rows(
        self, fixed: NDArray[np.int8], free: NDArray[np.int64], left: int
    ) -> tuple[Floats, Floats]:
        """Equality rows (R, N) and inequality rows (2 A, N) over (1, spins)."""
        r = self.reduced
        shift = r.A @ (fixed == 1)
        A = r.A[:, free]

        def spin(coefficients: Floats, rhs: Floats) -> Floats:
            # a.x = a.(s + 1) / 2, so a.x - rhs is ((a.s) + sum(a) - 2 rhs) / 2.
            return np.column_stack([coefficients.sum(axis=1) - 2 * rhs, coefficients])

        middle = (r.low + r.high)[self.equal] / 2
        equal = np.vstack(
            [
                spin(np.ones((1, free.size)), np.array([float(left)])),
                spin(A[self.equal], middle - shift[self.equal]),
            ]
        )
        low = np.where(np.isfinite(r.low), r.low, shift + np.minimum(A, 0).sum(axis=1))
        high = np.where(np.isfinite(r.high), r.high, shift + np.maximum(A, 0).sum(axis=1))
        ineq = np.vstack([spin(A, low - shift), -spin(A, high - shift)])
        ineq /= np.maximum(np.abs(ineq).max(axis=1, initial=0.0), 1e-300)[:, None]
        return independent(equal), ineq

    def _bound(
        self,
        h: Floats,
        J: Floats,
        base: float,
        fixed: NDArray[np.int8],
        free: NDArray[np.int64],
        left: int,
        dual: Dual,
        scratch: NDArray[np.uint8],
        first: bool,
    ) -> tuple[float, Floats, Dual]:
        size = free.size + 1
        C = spin_matrix(h, J, base)
        rows, ineq = self._rows(fixed, free, left)
        count = dual.z.size
        capacity = max(CAPACITY, count)
        cuts = np.zeros((capacity, 3), dtype=np.int16)
        kinds = np.zeros(capacity, dtype=np.int8)
        z = np.zeros(capacity)
        cuts[:count], kinds[:count], z[:count] = dual.cuts, dual.kinds, dual.z
        y, mu = dual.y.copy(), dual.mu.copy()
        centre = dual.centre.astype(np.float64)
        X = np.zeros((size, size))
        sigma = SIGMA / size
        lower, count, evaluations = _sdp.sdp_bound(
            C,
            rows,
            ineq,
            y,
            z,
            mu,
            cuts,
            kinds,
            count,
            self.pool.threshold,
            self.stop,
            scratch,
            centre,
            X,
            ROUNDS,
            ITERATIONS,
            CUTS_PER_ROUND,
            sigma,
            sigma,
            GIVE_UP,
        )
        self.evaluations += int(evaluations)
        splits = np.full((2, size), -np.inf)
        if lower < self.pool.threshold[0] and not self.stop[0]:
            _sdp.split_bounds(C, rows, ineq, y, z, mu, cuts, kinds, count, splits)
        kept = z[:count] > 0
        new = Dual(
            free,
            y,
            mu,
            z[:count][kept],
            cuts[:count][kept],
            kinds[:count][kept],
            centre.astype(np.float32),
        )
        return float(lower), splits, new


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
