"""Exact branch and bound: the K best states with a proof.

Two engines share the tree. A node that is small enough is enumerated depth first with a cheap
combinatorial bound (`dfs`); any other gets a semidefinite bound with triangle inequalities
(`sdp`) that starts from its parent's multipliers, is left as soon as it proves the node hopeless,
and fixes variables whose other value it proves hopeless. Nodes are taken best bound first by all
threads. The search starts from the K states of a tabu search, so that the first bound already
competes with a good threshold.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

from isingcut.errors import InputError
from isingcut.ising.problem import Problem
from isingcut.ising.solvers._reduced import reduce
from isingcut.ising.solvers.base import Solution
from isingcut.ising.solvers.branching.loop import BranchAndBound

__all__ = ["Exact"]


@dataclass(frozen=True)
class Exact:
    """Branch and bound with semidefinite bounds; anytime.

    On a limit, or on Ctrl-C, the best states so far come back with the proven lower bound and
    ``proven=False``. The states found do not depend on timing once the search is complete,
    except among states tied with the K-th.

    Args:
        seconds: wall-clock limit, or None.
        nodes: limit on the nodes of the semidefinite tree, or None.
        threads: 0 uses every core.
        seed: of the tabu search that starts it.
        memory_mb: most memory the open nodes may take; beyond it they keep no multipliers.
    """

    seconds: float | None = None
    nodes: int | None = None
    threads: int = 0
    seed: int = 0
    memory_mb: float = 150.0

    def solve(self, problem: Problem, k: int) -> Solution:
        """The ``k`` lowest states, proven unless a limit came first."""
        if self.threads < 0 or (self.seconds is not None and self.seconds <= 0):
            raise InputError("exact needs threads >= 0 and a time limit above 0")
        reduced = reduce(problem)
        threads = self.threads or os.cpu_count() or 1
        search = BranchAndBound(reduced, k, self.seed, self.memory_mb)
        search.warm_start(problem)
        # Our threads fill the cores; BLAS threads of their own would only wait for each other.
        with threadpool_limits(limits=1, user_api="blas"):
            search.run(threads, self.seconds, self.nodes)
        states = search.pool.states(reduced.n)
        energies = search.energies(states)
        frontier = search.frontier()
        info = {
            "nodes": search.nodes,
            "enumerated": search.leaves.visited,
            "evaluations": search.relaxation.evaluations,
            "open_nodes": search.open_nodes(),
            # So many of the states, from the lowest, are proven to hold their rank.
            "proven_states": int((energies <= frontier).sum()),
            "stopped": search.stopped,
            "threads": threads,
        }
        bound = min(frontier, search.pool.best)
        lower = None if np.isneginf(bound) else bound * search.scale + reduced.c
        return Solution(reduced.expand(states), lower, search.stopped is None, info)
