"""Any dimod sampler or CQM solver the user has, hardware included: ``dimod:package.Class``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from isingcut.errors import InputError
from isingcut.ising.problem import Problem
from isingcut.ising.solvers._apart import MEMORY_MB, draw_apart
from isingcut.ising.solvers._reduced import reduce
from isingcut.ising.solvers._sampling import drawn
from isingcut.ising.solvers.base import NO_CLASS, Solution

__all__ = ["Dimod"]


@dataclass(frozen=True)
class Dimod:
    """One call of a dimod sampler; infeasible samples are repaired or dropped, and counted.

    A class with ``sample_cqm`` is given the constraints as rows, any other the penalty form.

    Args:
        sampler: the class as ``package.module.Class``, which is imported and called in a process
            of its own; or, from Python, a class or an instance, which is called in this process
            and keeps to no limit. A class is made without arguments.
        reads: ``num_reads``, where the sampler has it.
        seed: ``seed``, where the sampler has it.
        seconds: wall-clock limit of a sampler that is named; beyond it (and a second of grace)
            its process is ended, and that is an error. None waits.
        memory_mb: most memory that process may take.
        penalty: share of the weight that no swap can outbid, for samplers without rows.
        options: further keyword arguments of the call.
    """

    sampler: Any = ""
    reads: int = 100
    seed: int = 0
    seconds: float | None = None
    memory_mb: float = MEMORY_MB
    penalty: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def solve(self, problem: Problem, k: int) -> Solution:
        """Up to ``k`` states, without a proof."""
        if self.sampler == "":
            raise InputError(NO_CLASS)
        reduced = reduce(problem)
        if not reduced.n:
            return Solution(reduced.expand(np.zeros((1, 0))))
        small = reduced.as_problem()
        wanted = {"num_reads": self.reads, "seed": self.seed, **self.options}
        if isinstance(self.sampler, str):
            states, info = draw_apart(
                small,
                k,
                self.sampler,
                wanted,
                self.penalty,
                seconds=self.seconds,
                memory_mb=self.memory_mb,
            )
        else:
            shown = self.sampler if isinstance(self.sampler, type) else type(self.sampler)
            states, info = drawn(small, k, self.sampler, wanted, self.penalty, shown.__name__)
        return Solution(reduced.expand(states), None, False, info)
