"""Simulated annealing from dwave-samplers on the penalty form, for comparison."""

from __future__ import annotations

from dataclasses import dataclass

from isingcut.problem import Problem
from isingcut.solvers._sampling import sample
from isingcut.solvers.base import Solution

__all__ = ["Anneal"]


@dataclass(frozen=True)
class Anneal:
    """`dwave.samplers.SimulatedAnnealingSampler`; needs the extra ``solvers``.

    Args:
        reads: independent anneals.
        sweeps: of each.
        seed: of the sampler.
        penalty: share of the weight that no swap can outbid.
    """

    reads: int = 200
    sweeps: int = 1000
    seed: int = 0
    penalty: float = 1.0

    def solve(self, problem: Problem, k: int) -> Solution:
        """Up to ``k`` states, without a proof."""
        wanted = {"num_reads": self.reads, "num_sweeps": self.sweeps, "seed": self.seed}
        return sample(problem, k, "dwave.samplers.SimulatedAnnealingSampler", wanted, self.penalty)
