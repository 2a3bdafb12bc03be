"""Any dimod sampler or CQM solver the user has, hardware included: ``dimod:package.Class``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from isingcut.errors import InputError
from isingcut.problem import Problem
from isingcut.solvers._sampling import sample
from isingcut.solvers.base import Solution

__all__ = ["Dimod"]


@dataclass(frozen=True)
class Dimod:
    """One call of a dimod sampler; infeasible samples are repaired or dropped, and counted.

    A class with ``sample_cqm`` is given the constraints as rows, any other the penalty form.

    Args:
        sampler: the class as ``package.module.Class``; it is made without arguments.
        reads: ``num_reads``, where the sampler has it.
        seed: ``seed``, where the sampler has it.
        penalty: share of the weight that no swap can outbid, for samplers without rows.
        options: further keyword arguments of the call.
    """

    sampler: str = ""
    reads: int = 100
    seed: int = 0
    penalty: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def solve(self, problem: Problem, k: int) -> Solution:
        """Up to ``k`` states, without a proof."""
        if not self.sampler:
            raise InputError("the solver 'dimod' needs a class: write dimod:package.Class")
        wanted = {"num_reads": self.reads, "seed": self.seed, **self.options}
        return sample(problem, k, self.sampler, wanted, self.penalty)
