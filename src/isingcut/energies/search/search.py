"""The search loop: first states, then rounds of proposals and measurements within a budget.

    singles and pairs on few samples  ->  pair energy E0
    beam over sizes                   ->  the first states of every target
    rounds, the targets in turn:
        measured states -> posterior over Hamiltonians -> its minima and near moves
        -> measured on few samples -> the best of them on more -> on all

All targets share the measured states. The constants below were chosen on
SmolLM2-135M (docs/experiments.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np

from isingcut.data.tokens import TokenSet
from isingcut.energies.search import proposals
from isingcut.energies.search.evaluator import Estimates, Evaluator
from isingcut.energies.search.proposals import (
    Target,
    beam_over_sizes,
    flip_each,
    one_pass_states,
    pair_energy,
)
from isingcut.energies.search.surrogate import Surrogate
from isingcut.errors import InputError
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.states import Bools, States, blocks_of, key_of
from isingcut.measure.losses import tree_nodes
from isingcut.measure.work import Work
from isingcut.models.replay import Replay

FIRST_SHARE = 0.125
FIRST_TOKENS = 512
"""First rung of a state: the smaller of this share of the samples and this number of tokens.
Little text is enough to sort states."""
GROWTH = 3.0
"""Factor between the sample numbers of consecutive rungs; the last rung is all samples."""
EFFORT = 0.4
"""Default budget of a target, as a share of the cost of a greedy path to it. Most searches end
after half of it."""
LEAST_EFFORT = 8.0
"""Smallest default budget of a target, in passes."""
PRIOR_SHARE = 0.1
"""Largest share of the budget for the pair energy."""
ONE_PASS_SHARE = 0.05
"""Largest share of the budget for one pass of the original; if needed, it takes fewer samples."""
FIRST = 30
"""States proposed in the first round, most of them the lowest of the pair energy."""
DRAWN = 6
MINIMA = 4
MOVES = 6
SLOPES = 2
"""States proposed per later round: ground states of sampled Hamiltonians, lowest states of the
mean, moves around the best states in the order of the surrogate's bound, and moves around the best
state in the order of its gate slopes."""
DRAWS = 20
"""Hamiltonians sampled per round."""
GAIN = 0.01
CHANCE = 0.05
"""A target is done when the chance that a state is better than the best one by more than `GAIN`
times its loss is at most `CHANCE`. The chance is the share of sampled Hamiltonians with such a
state."""
PROMOTED = 3
"""States promoted to the next rung per round."""
FINALISTS = 4
"""States measured on all samples at the end, or on as many as the budget allows."""
RESERVED = 1 / 3
"""Largest share of the budget reserved for the finalists."""


def rungs(samples: int, tokens: int) -> list[int]:
    """Return the numbers of samples that a state is measured on, ascending.

    Args:
        samples: number of samples of the text.
        tokens: number of tokens of the text.
    """
    share = min(FIRST_SHARE, FIRST_TOKENS / tokens)
    steps = {samples}
    # Omit a step that is only a few samples below all samples.
    while share * GROWTH**0.5 < 1:
        steps.add(max(1, round(share * samples)))
        share *= GROWTH
    return sorted(steps)


def default_passes(n: int, targets: Sequence[Target]) -> float:
    """Return the default budget in passes: a share of a greedy path's cost for each target.

    All targets together get at most the cost of one greedy path to the largest, which they share.
    """
    shares = [
        max(LEAST_EFFORT, EFFORT * greedy_price(n, target.size)) for target in targets
    ]
    most = greedy_price(n, max(target.size for target in targets))
    return min(sum(shares), max(most, LEAST_EFFORT))


def greedy_price(n: int, remove: int) -> float:
    """Return the passes of a greedy path to ``remove`` of ``n`` blocks, with shared prefixes."""
    state = np.zeros(n, dtype=bool)
    total = 0
    for step in range(remove):
        total += tree_nodes(flip_each(state)[~state])
        # The cost depends slightly on the removed blocks; assume evenly spread ones.
        state[np.flatnonzero(~state)[(step * 7) % int((~state).sum())]] = True
    return total / n


@dataclass
class Goal:
    """The progress of one target.

    Attributes:
        best: best state so far, or None.
        rounds: number of rounds so far.
        trace: best state after each round, with the cost so far.
        exhausted: whether every state of the target was measured on all samples.
    """

    target: Target
    best: Bools | None = None
    rounds: int = 0
    trace: list[dict[str, Any]] = field(default_factory=list)
    exhausted: bool = False

    @property
    def removed(self) -> tuple[int, ...]:
        """The removed blocks of the best state, ascending; empty without one."""
        return () if self.best is None else tuple(blocks_of(self.best))


class Search:
    """A search for the best states of some targets within a budget.

    Deterministic for a given seed and budget. With a journal in ``work``, a killed search resumes.

    Args:
        targets: removals to search for.
        passes: budget in full forward passes over ``tokens``; None for `default_passes`. A
            function is called once and its value kept in the journal, so that a resumed search has
            the same budget.
        seed: random seed.

    Attributes:
        goals: progress of the targets.
        one_pass: number of samples for the pass of the original.
        rungs: numbers of samples that a state is measured on, ascending.
        evaluator: measurements and their cost.

    Raises:
        InputError: fewer than two samples.
    """

    def __init__(
        self,
        replay: Replay,
        tokens: TokenSet,
        work: Work,
        targets: Sequence[Target],
        passes: float | Callable[[], float] | None = None,
        seed: int = 0,
    ) -> None:
        if tokens.samples < 2:
            raise InputError(
                "a search needs at least 2 calibration samples; raise --samples"
            )
        self.evaluator = Evaluator(replay, tokens, work, seed)
        if callable(passes):
            timed = passes
            once = self.evaluator.ledger.measure_once
            row = once("budget", 0.0, 0.0, lambda: np.array([timed()]))
            passes = float(row[0])
        self.budget = passes or default_passes(len(replay), targets)
        self.evaluator.budget = self.budget
        self.goals = [Goal(target) for target in targets]
        self.rungs = rungs(tokens.samples, int(tokens.compared.sum()))
        affordable = int(ONE_PASS_SHARE * self.budget * tokens.samples)
        self.one_pass = max(1, min(tokens.samples, affordable))
        self._rng = np.random.default_rng([seed, 0x5EA2C4])
        influence, _ = self.evaluator.one_pass(self.one_pass)
        most = PRIOR_SHARE * self.budget
        self._prior = pair_energy(self.evaluator, most, self.rungs[0], influence)

    def run(self) -> Search:
        """Search until the budget is spent or all targets are done; return this search."""
        self._exhaust()
        self._climb()
        active = [g for g in self.goals if not g.exhausted]
        while active:
            active = [g for g in active if self._turn(g)]
        for goal in self.goals:
            self._finish(goal)
        return self

    def energy(self) -> Hamiltonian:
        """Return the posterior energy over all targets; without measurements, the pair energy."""
        surrogate = self._surrogate([g.target for g in self.goals])
        return self._prior if surrogate is None else surrogate.mean

    def estimates(self, fits: Callable[[States], Bools]) -> Estimates | None:
        """Return estimates of the measured states that fit; None if there are none."""
        known = [k for k in self.evaluator.known.values() if k.n >= self.rungs[0]]
        states = np.array([k.state for k in known], dtype=bool)
        fitting = fits(states.reshape(-1, self.evaluator.blocks))
        chosen = [k for k, fit in zip(known, fitting, strict=True) if fit]
        return Estimates(self.evaluator, chosen, self.rungs) if chosen else None

    def _surrogate(self, targets: Sequence[Target]) -> Surrogate | None:
        """Return the posterior energy near some targets, or None if too few states are measured."""
        near = self.estimates(
            lambda states: np.any([t.near(states) for t in targets], axis=0)
        )
        if near is None or len(near.states) < 4:
            return None
        return proposals.fit_bounded(self._prior, near, targets)

    # first states -------------------------------------------------------------------------

    def _exhaust(self) -> None:
        """Measure all states of each target for which the budget allows this."""
        for goal in self.goals:
            states = proposals.list_states(goal.target, self.evaluator.blocks)
            if states is None or not self._afford(states, self.rungs[-1], final=True):
                continue
            label = f"remove {goal.target.label}: all {len(states)} states"
            self.evaluator.measure(states, self.rungs[-1], label)
            goal.exhausted = True
            self._note(goal)

    def _climb(self) -> None:
        """Run one beam over sizes for all targets that differ only in size, up to the largest."""
        groups: dict[tuple[bytes, ...], list[Target]] = {}
        for goal in self.goals:
            counted = (row.coefficients for row in goal.target.rows)
            key = tuple(row.tobytes() for row in counted if row.min() >= 0)
            groups.setdefault(key, []).append(goal.target)
        for group in groups.values():
            beam_over_sizes(
                self.evaluator,
                self._prior,
                max(group, key=lambda t: t.size),
                samples=self.rungs[0],
                afford=lambda states: self._afford(states, self.rungs[0]),
            )

    # rounds -------------------------------------------------------------------------------

    def _turn(self, goal: Goal) -> bool:
        """Run one round of one target; return False if it was the last one."""
        if self._left() <= 0:
            return False
        goal.rounds += 1
        states = self._propose(goal)
        if states and not self._afford(states, self.rungs[0]):
            return False
        label = (
            f"remove {goal.target.label}, round {goal.rounds}: {len(states)} new states"
        )
        with self.evaluator.together(label):
            self.evaluator.measure(states, self.rungs[0], label)
            self._promote(goal)
        self._note(goal)
        return bool(states)

    def _propose(self, goal: Goal) -> list[Bools]:
        target = goal.target
        seed = int(self._rng.integers(2**31))
        picked: dict[str, Bools] = {}

        def take(states: States, count: int) -> None:
            """Propose the first ``count`` states that are neither proposed nor measured."""
            most = len(picked) + count
            for state in states:
                if len(picked) == most:
                    break
                if (
                    self.evaluator.samples(state) < self.rungs[0]
                    and key_of(state) not in picked
                ):
                    picked[key_of(state)] = state

        if goal.rounds == 1:
            quick = one_pass_states(self.evaluator, target, self.one_pass)
            take(np.array([*quick.values()]), len(quick))
            take(proposals.find_windows(self._prior, target, 2), 2)
            states = proposals.find_lowest(self._prior, target, 2 * FIRST, seed)
            take(states, FIRST - len(picked))
            return list(picked.values())
        own = self.estimates(target.feasible)
        surrogate = self._surrogate([target])
        if own is None or surrogate is None or goal.best is None:
            return []
        around = own.states[np.argsort(own.loss, kind="stable")[:2]]
        drawn, gains = proposals.draw_minima(
            surrogate, target, DRAWS, self._rng, goal.best
        )
        if np.mean(gains > GAIN * own.loss[own.best()]) <= CHANCE:
            return []
        lowest = proposals.find_lowest(
            surrogate.mean, target, 4 * MINIMA + len(own.states), seed
        )
        take(lowest, MINIMA)
        take(drawn, DRAWN)
        moves = np.concatenate([proposals.list_exchanges(s, target) for s in around])
        if len(moves):
            take(proposals.by_bound(surrogate, moves), MOVES)
        slopes = self.evaluator.slopes(goal.best, self.rungs[0])
        moves = proposals.by_slope(goal.best, surrogate, slopes, target)
        take(moves, SLOPES)
        return list(picked.values())

    def _promote(self, goal: Goal) -> None:
        """Measure states that may be the best on the next rung, the lowest rung first.

        For a streamed model, only states of earlier rounds, in the same sweep as the new states.
        """
        for level, rung in enumerate(self.rungs[1:]):
            known = self.estimates(goal.target.feasible)
            if known is None:
                return
            best = known.loss[known.best()]
            here = np.flatnonzero(
                (known.rung == level) & (known.loss - known.sd < best)
            )
            order = here[np.argsort(known.loss[here], kind="stable")]
            states = known.states[order[: max(1, PROMOTED - level)]]
            if len(states) and self._afford(states, rung):
                self.evaluator.measure(
                    states, rung, f"remove {goal.target.label}: more samples"
                )

    def _finish(self, goal: Goal) -> None:
        """Measure a target's finalists on as many samples as the budget still allows.

        Only very small budgets do not allow all samples. A target without any measurement gets one
        state on the first rung, even beyond the budget.
        """
        known = self.estimates(goal.target.feasible)
        if known is None:
            states = proposals.find_lowest(self._prior, goal.target, 1, 0)
            self.evaluator.measure(
                states, self.rungs[0], "the pair energy's ground state"
            )
        else:
            states = known.states[np.argsort(known.loss, kind="stable")[:FINALISTS]]
        # At least two finalists, if there are two, because one alone cannot be compared.
        counts = range(len(states), min(2, len(states)) - 1, -1)
        for rung, count in product(reversed(self.rungs), counts):
            if self._afford(states[:count], rung, final=True):
                self.evaluator.measure(
                    states[:count], rung, f"remove {goal.target.label}: finalists"
                )
                break
        self._note(goal)

    # budget -------------------------------------------------------------------------------

    def _reserve(self) -> float:
        """Return the passes reserved for the finalists of all targets."""
        n = self.evaluator.blocks
        each = sum((n - g.target.low) / n for g in self.goals)
        return min(FINALISTS * each * 0.8, RESERVED * self.budget)

    def _left(self) -> float:
        return self.budget - self._reserve() - self.evaluator.spent

    def _afford(
        self, states: States | Sequence[Bools], n: int, *, final: bool = False
    ) -> bool:
        left = self._left() + (self._reserve() if final else 0.0)
        return self.evaluator.price(states, n) <= left

    def _note(self, goal: Goal) -> None:
        known = self.estimates(goal.target.feasible)
        if known is None:
            return
        best = known.best()
        goal.best = state = known.states[best]
        goal.trace.append(
            {
                "passes": self.evaluator.ledger.passes,
                "removed": blocks_of(state),
                "kl": float(known.loss[best]),
                "samples": self.rungs[int(known.rung[best])],
            }
        )
