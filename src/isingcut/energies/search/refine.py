"""The search: seeds, surrogate, proposals, racing - until the budget is spent.

    singles and pairs on few samples  ->  pair energy E0
    beam over sizes                   ->  the first states of every target
    rounds, the targets in turn:
        measured states -> posterior over Hamiltonians -> its minima and near moves
        -> measured on few samples -> the best of them on more -> on all

Every state measured for one target stays known to all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from isingcut.data.calibration import TokenSet
from isingcut.energies.search import proposals
from isingcut.energies.search.begin import beam_over_sizes, begin
from isingcut.energies.search.estimates import Estimates
from isingcut.energies.search.evaluator import Evaluator
from isingcut.energies.search.plan import Plan
from isingcut.energies.search.surrogate import Surrogate
from isingcut.energies.search.targets import Target
from isingcut.errors import InputError
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.states import Bools, States
from isingcut.measure.work import Work
from isingcut.models.replay import Replay


@dataclass
class Progressed:
    """One target's progress.

    Attributes:
        best: the best state so far, or None.
        stale: rounds since it last changed.
        rounds: rounds done.
        exhausted: every state of the target was measured on all samples.
    """

    target: Target
    best: Bools | None = None
    stale: int = 0
    rounds: int = 0
    exhausted: bool = False


class Refinement:
    """A search in progress; deterministic for its seed, whatever was killed and resumed.

    Args:
        passes: budget in full forward passes over ``tokens``.
    """

    def __init__(
        self,
        replay: Replay,
        tokens: TokenSet,
        targets: Sequence[Target],
        passes: float,
        work: Work,
        seed: int,
        plan: Plan,
    ) -> None:
        if tokens.samples < 2:
            raise InputError("a search needs at least 2 calibration samples; raise --samples")
        self.evaluator = Evaluator(replay, tokens, work, seed)
        self.evaluator.budget = passes
        self.targets, self.budget, self.plan = targets, passes, plan
        self.rng = np.random.default_rng([seed, 0x5EA2C4])
        self.rungs = plan.rungs(tokens.samples, int(tokens.mask.sum()))
        self.goals = [Progressed(t) for t in targets]
        self.trace: list[dict[str, Any]] = []
        self.origins: dict[bytes, str] = {}
        begun = begin(self.evaluator, plan.prior_share * passes, self.rungs[0])
        self.prior, self.influence = begun.energy, begun.influence
        self.prior_samples, self.prior_pairs = begun.samples, begun.pairs

    def climb(self) -> None:
        """A beam over sizes to the largest target; targets that differ in the count share it."""
        groups: dict[tuple[bytes, ...], list[Target]] = {}
        for goal in self.goals:
            key = tuple(
                r.coefficients.tobytes() for r in goal.target.rows if r.coefficients.min() >= 0
            )
            groups.setdefault(key, []).append(goal.target)
        for group in groups.values():
            largest = max(group, key=lambda t: t.size)
            beam_over_sizes(
                self.evaluator,
                self.prior,
                largest,
                samples=self.rungs[0],
                width=self.plan.beam,
                children=self.plan.children,
                afford=lambda states: self._afford(states, self.rungs[0]),
            )

    # rounds -------------------------------------------------------------------------------

    def exhaust(self) -> None:
        """Measure every state of the targets for which the budget allows it."""
        for goal in self.goals:
            states = proposals.every(goal.target, self.evaluator.blocks)
            if states is None or not self._afford(states, self.rungs[-1], final=True):
                continue
            self.evaluator.measure(
                states, self.rungs[-1], f"remove {goal.target.label}: all {len(states)} states"
            )
            goal.exhausted = True
            self._note(goal)

    def rounds(self) -> None:
        """Turns of all targets until the budget is spent or none of them moves."""
        active = [g for g in self.goals if not g.exhausted]
        while active:
            active = [g for g in active if self._turn(g)]

    def _turn(self, goal: Progressed) -> bool:
        """One round of one target; False when it is done."""
        if self._left() <= 0:
            return False
        goal.rounds += 1
        states = self._propose(goal)
        if len(states) and not self._afford(states, self.rungs[0]):
            return False
        if len(states):
            label = f"remove {goal.target.label}, round {goal.rounds}"
            self.evaluator.measure(states, self.rungs[0], f"{label}: {len(states)} new states")
        self._promote(goal, self.plan.promoted)
        self._note(goal)
        return goal.stale < self.plan.patience and (len(states) > 0 or goal.stale == 0)

    def estimates(self, target: Target, *, near: int = 0) -> Estimates | None:
        """Estimates of the measured states of a target (``near``: and of sizes close to it)."""
        known = [k for k in self.evaluator.known() if k.n >= self.rungs[0]]
        states = np.array([k.state for k in known], dtype=bool).reshape(-1, self.evaluator.blocks)
        fits = target.near(states, near) if near else target.feasible(states)
        chosen = [k for k, ok in zip(known, fits, strict=True) if ok]
        return Estimates(self.evaluator, chosen, self.rungs) if chosen else None

    def surrogate(self, target: Target) -> Surrogate | None:
        """The posterior energy near a target, or None while nothing was measured there."""
        own = self.estimates(target)
        found = self.estimates(target, near=1)
        if own is None or found is None or len(found.states) < 4:
            return None
        return Surrogate(self.prior, found.states, found.loss, found.sd)

    def energy(self) -> Hamiltonian:
        """The posterior energy over all targets; the pair energy while nothing was measured."""
        known = [k for k in self.evaluator.known() if k.n >= self.rungs[0]]
        near = [k for k in known if any(g.target.near(k.state[None], 1)[0] for g in self.goals)]
        if len(near) < 4:
            return self.prior
        found = Estimates(self.evaluator, near, self.rungs)
        return Surrogate(self.prior, found.states, found.loss, found.sd).mean

    def _propose(self, goal: Progressed) -> States:
        target, plan = goal.target, self.plan
        seed = int(self.rng.integers(2**31))

        def seen(state: Bools) -> bool:
            known = self.evaluator.get(state)
            return known is not None and known.n >= self.rungs[0]

        surrogate = self.surrogate(target)
        own = self.estimates(target)
        picked: list[Bools] = []

        def take(states: States, count: int, origin: str) -> None:
            got = {p.tobytes() for p in picked}
            fresh = proposals.unseen(states, lambda s: seen(s) or s.tobytes() in got, count)
            picked.extend(fresh)
            self.origins.update({s.tobytes(): origin for s in fresh})

        if goal.rounds == 1:
            wanted = plan.draws + plan.minima + plan.moves
            take(proposals.windows(self.prior, target, 2), 2, "window")
            influence = Hamiltonian(self.influence, np.zeros_like(self.prior.J))
            take(proposals.lowest(influence, target, 1, seed), 1, "block influence")
            states = proposals.lowest(self.prior, target, 2 * wanted, seed)
            take(states, wanted - len(picked), "pair energy")
        if surrogate is None or own is None or goal.rounds == 1:
            return _stack(picked, self.evaluator.blocks)
        order = np.argsort(own.loss, kind="stable")
        around = [own.states[i] for i in order[:2]]
        lowest = proposals.lowest(surrogate.mean, target, 4 * plan.minima + len(own.states), seed)
        take(lowest, plan.minima, "minimum of the mean")
        # The longer nothing better is found, the farther the draws go.
        heat = 1.0 + 0.25 * goal.stale
        drawn = proposals.thompson(surrogate, target, plan.draws, self.rng, heat)
        take(drawn, plan.draws, "minimum of a draw")
        moves = np.concatenate([proposals.exchanges(s, target) for s in around])
        if len(moves):
            take(proposals.by_bound(surrogate, moves, len(moves)), plan.moves, "exchange")
        if plan.slopes and goal.best is not None:
            slopes = self.evaluator.slopes(goal.best, self.rungs[0])
            near = proposals.by_slope(goal.best, surrogate, slopes, target)
            take(near, plan.slopes, "exchange by slope")
        return _stack(picked, self.evaluator.blocks)

    # racing -------------------------------------------------------------------------------

    def _promote(self, goal: Progressed, count: int, *, sure: bool = False) -> None:
        """Take the states that may be the best one rung up each, the lowest rung first."""
        for level in range(len(self.rungs) - 1):
            found = self.estimates(goal.target)
            if found is None:
                return
            best = found.loss[found.best()]
            here = np.flatnonzero(found.rung == level)
            bound = found.loss[here] - found.sd[here]
            fit = here[np.argsort(found.loss[here], kind="stable")]
            if not sure:
                hopeful = set(here[bound < best].tolist())
                fit = np.array([i for i in fit if i in hopeful], dtype=int)
            states = found.states[fit[: max(1, count - level)]]
            if len(states) and self._afford(states, self.rungs[level + 1], final=sure):
                self.evaluator.measure(
                    states, self.rungs[level + 1], f"remove {goal.target.label}: a closer look"
                )

    def finish(self) -> None:
        """Measure every target's finalists on as many samples as the budget still allows.

        Those are all samples but for very small budgets. A target of which nothing was measured
        gets one state on the first rung, whatever it costs.
        """
        for goal in self.goals:
            found = self.estimates(goal.target)
            if found is None:
                states = proposals.lowest(self.prior, goal.target, 1, 0)
                self.evaluator.measure(states, self.rungs[0], "the pair energy's ground state")
                found = self.estimates(goal.target)
                assert found is not None
            order = np.argsort(found.loss, kind="stable")
            for rung in reversed(self.rungs):
                if count := self._affordable(found.states[order], rung):
                    label = f"remove {goal.target.label}: finalists"
                    self.evaluator.measure(found.states[order[:count]], rung, label)
                    break
            self._note(goal)

    def _affordable(self, states: States, rung: int) -> int:
        """How many of the first states, finalists at most, the budget pays for on a rung.

        One of several would be compared with none: it counts as 0.
        """
        fewest = min(2, len(states))
        for count in range(min(self.plan.finalists, len(states)), fewest - 1, -1):
            if self._afford(states[:count], rung, final=True):
                return count
        return 0

    # budget -------------------------------------------------------------------------------

    def _reserve(self) -> float:
        """What the finalists of every target may still cost."""
        n = self.evaluator.blocks
        each = sum((n - g.target.low) / n for g in self.goals)
        return min(self.plan.finalists * each * 0.8, self.plan.reserved * self.budget)

    def _left(self) -> float:
        return self.budget - self._reserve() - self.evaluator.passes

    def _afford(self, states: States, n: int, *, final: bool = False) -> bool:
        left = self._left() + (self._reserve() if final else 0.0)
        return self.evaluator.price(states, n) <= left

    def _note(self, goal: Progressed) -> None:
        found = self.estimates(goal.target)
        if found is None:
            return
        best = found.best()
        state = found.states[best]
        changed = goal.best is None or bool((state != goal.best).any())
        goal.stale = 0 if changed else goal.stale + 1
        goal.best = state
        self.trace.append(
            {
                "passes": self.evaluator.passes,
                "heads": self.evaluator.heads,
                "remove": goal.target.label,
                "removed": np.flatnonzero(state).tolist(),
                "kl": float(found.loss[best]),
                "samples": self.rungs[int(found.rung[best])],
                "origin": self.origins.get(state.tobytes(), "beam"),
            }
        )


def _stack(states: Sequence[Bools], n: int) -> States:
    return np.array(states, dtype=bool).reshape(-1, n)
