"""Tabu search from dwave-samplers on the penalty form, for comparison."""

from __future__ import annotations

from dataclasses import dataclass

from isingcut.problem import Problem
from isingcut.solvers._sampling import sample
from isingcut.solvers.base import Solution

__all__ = ["TabuQubo"]


@dataclass(frozen=True)
class TabuQubo:
    """`dwave.samplers.TabuSampler`; needs the extra ``solvers``.

    Args:
        reads: independent searches.
        timeout: milliseconds of each.
        seed: of the sampler.
        penalty: share of the weight that no swap can outbid.
    """

    reads: int = 50
    timeout: int = 20
    seed: int = 0
    penalty: float = 1.0

    def solve(self, problem: Problem, k: int) -> Solution:
        """Up to ``k`` states, without a proof."""
        wanted = {"num_reads": self.reads, "timeout": self.timeout, "seed": self.seed}
        return sample(problem, k, "dwave.samplers.TabuSampler", wanted, self.penalty)
