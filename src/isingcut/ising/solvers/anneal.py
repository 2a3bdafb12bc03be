"""Simulated annealing from dwave-samplers on the penalty form, for comparison."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from isingcut.ising.problem import Problem
from isingcut.ising.solvers._sampling import Bools, drawn, sample, sampler_class
from isingcut.ising.solvers.base import Solution

__all__ = ["Anneal"]


@dataclass(frozen=True)
class Anneal:
    """`dwave.samplers.SimulatedAnnealingSampler`; needs the extra ``solvers``.

    Args:
        reads: independent anneals.
        sweeps: of each.
        seed: of the sampler.
        penalty: share of the weight that no swap can outbid.
        seconds: wall-clock limit, between two anneals; None waits.
    """

    reads: int = 200
    sweeps: int = 1000
    seed: int = 0
    penalty: float = 1.0
    seconds: float | None = None

    def solve(self, problem: Problem, k: int) -> Solution:
        """Up to ``k`` states, without a proof."""
        wanted: dict[str, Any] = {
            "num_reads": self.reads,
            "num_sweeps": self.sweeps,
            "seed": self.seed,
        }
        if self.seconds is not None:
            end = time.monotonic() + self.seconds
            wanted["interrupt_function"] = lambda: time.monotonic() > end
        name = "dwave.samplers.SimulatedAnnealingSampler"

        def draw(small: Problem, k: int) -> tuple[Bools, dict[str, Any]]:
            return drawn(small, k, sampler_class(name), wanted, self.penalty, name)

        return sample(problem, k, draw)
