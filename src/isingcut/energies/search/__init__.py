"""The product's core search: a budget of measurements in, the best states of every target out.

evaluator (losses on growing samples) -> begin (pair energy, beam over sizes)
    -> estimates (one scale) -> surrogate (posterior energy) -> proposals (its minima, moves)
    -> refine (the loop, racing, budget)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from isingcut.data.calibration import TokenSet
from isingcut.energies.search.estimates import Estimates
from isingcut.energies.search.plan import Plan, greedy_price
from isingcut.energies.search.refine import Refinement
from isingcut.energies.search.targets import Target
from isingcut.errors import InputError
from isingcut.measure.work import Work
from isingcut.models.replay import Replay

__all__ = ["Estimates", "Found", "Plan", "Search", "Target", "greedy_price"]


@dataclass(frozen=True, eq=False)
class Found:
    """What a search found.

    Attributes:
        passes: price in full forward passes over the given tokens; a state measured on a part
            of the samples counts in part, shared prefixes once.
        heads: output heads, in the same unit.
        evaluations: distinct states measured.
        trace: the best state of a target after each of its rounds, with the price so far.
        refinement: the finished search: its measurements and surrogates.
    """

    passes: float
    heads: float
    evaluations: int
    trace: list[dict[str, Any]]
    refinement: Refinement = field(repr=False)

    def best(self, remove: int | str) -> tuple[int, ...]:
        """The blocks of the best state of one target, ascending.

        Raises:
            InputError: the search had no such target.
        """
        for goal in self.refinement.goals:
            if goal.target.label == str(remove):
                assert goal.best is not None
                return tuple(int(i) for i in np.flatnonzero(goal.best))
        known = ", ".join(g.target.label for g in self.refinement.goals)
        raise InputError(f"the search was not for {remove!r}; it had: {known}")


@dataclass(frozen=True)
class Search:
    """The budgeted search.

    Attributes:
        removals: numbers of blocks to remove; one search serves them all.
        passes: budget in forward passes over the tokens; None takes what a greedy path to the
            largest removal would cost.
        plan: how the budget is used.
    """

    removals: tuple[int, ...]
    passes: float | None = None
    plan: Plan = field(default_factory=Plan)

    def run(
        self,
        replay: Replay,
        tokens: TokenSet,
        work: Work,
        seed: int = 0,
        targets: Sequence[Target] | None = None,
    ) -> Found:
        """Search; with a journal in ``work`` a killed search resumes where it was.

        Args:
            targets: what to look for instead of ``removals``, where constraints are more than
                a count.

        Raises:
            InputError: a number of removals that the model does not allow.
        """
        n = len(replay)
        if targets is None:
            for remove in self.removals:
                if not 1 <= remove < n:
                    raise InputError(f"cannot remove {remove} of {n} blocks; expected 1 to {n - 1}")
            targets = [Target.count(n, remove) for remove in sorted(set(self.removals))]
        if not targets:
            raise InputError("a search needs at least one number of blocks to remove")
        passes = self.passes or greedy_price(n, max(t.size for t in targets))
        refinement = Refinement(replay, tokens, targets, passes, work, seed, self.plan)
        refinement.exhaust()
        refinement.climb()
        refinement.rounds()
        refinement.finish()
        evaluator = refinement.evaluator
        return Found(
            evaluator.passes, evaluator.heads, evaluator.evaluations, refinement.trace, refinement
        )
