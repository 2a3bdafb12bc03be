"""Tabu search from dwave-samplers on the penalty form, for comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from isingcut.ising.problem import Problem
from isingcut.ising.solvers._sampling import Bools, drawn, sample, sampler_class
from isingcut.ising.solvers.base import Solution

__all__ = ["TabuQubo"]


@dataclass(frozen=True)
class TabuQubo:
    """`dwave.samplers.TabuSampler`; needs the extra ``solvers``.

    Args:
        reads: independent searches.
        timeout: milliseconds of each.
        seed: of the sampler.
        penalty: share of the weight that no swap can outbid.
        seconds: wall-clock limit of all searches together: each has its share at most.
    """

    reads: int = 50
    timeout: int = 20
    seed: int = 0
    penalty: float = 1.0
    seconds: float | None = None

    def solve(self, problem: Problem, k: int) -> Solution:
        """Up to ``k`` states, without a proof."""
        timeout = self.timeout
        if self.seconds is not None:
            timeout = max(1, min(timeout, int(1000 * self.seconds / self.reads)))
        wanted = {"num_reads": self.reads, "timeout": timeout, "seed": self.seed}
        name = "dwave.samplers.TabuSampler"

        def draw(small: Problem, k: int) -> tuple[Bools, dict[str, Any]]:
            return drawn(small, k, sampler_class(name), wanted, self.penalty, name)

        return sample(problem, k, draw)
