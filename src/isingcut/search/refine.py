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
import numpy.typing as npt

from isingcut.blocks import Replay
from isingcut.calibration import TokenSet
from isingcut.energies.base import Work
from isingcut.errors import InputError
from isingcut.hamiltonian import Hamiltonian
from isingcut.measure import tree_nodes
from isingcut.search import proposals
from isingcut.search.begin import beam_over_sizes, begin
from isingcut.search.estimates import Estimates
from isingcut.search.evaluator import Evaluator
from isingcut.search.surrogate import Surrogate
from isingcut.search.targets import Target

States = npt.NDArray[np.bool_]
State = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Plan:
    """How the budget is used; the defaults were chosen on SmolLM2-135M.

    Attributes:
        first_share, first_tokens: what a state is first measured on, the smaller of a share of
            the samples and as many as hold so many tokens: sorting takes few, however large the
            text is (docs/experiments.md).
        growth: factor on the samples from one rung to the next; the last is all of them.
        prior_share: most of the budget that the pair energy may take.
        beam: states kept per size on the way up.
        children: states measured per size on the way up.
        draws, minima, moves, slopes: states proposed in a round: ground states of sampled
            Hamiltonians, lowest states of the mean, moves around the best states by the
            surrogate's bound, and moves around the best one by the slopes of its gates.
        promoted: states taken to the next rung in a round.
        finalists: states that are at least measured on all samples.
        patience: rounds without a new best state after which a target is left alone.
    """

    first_share: float = 0.125
    first_tokens: int = 512
    growth: float = 3.0
    prior_share: float = 0.4
    beam: int = 3
    children: int = 8
    draws: int = 6
    minima: int = 4
    moves: int = 6
    slopes: int = 2
    promoted: int = 3
    finalists: int = 4
    patience: int = 8

    def rungs(self, samples: int, tokens: int) -> list[int]:
        """Numbers of samples that a state is measured on, step by step, ascending.

        Args:
            samples: of the text.
            tokens: it holds.
        """
        share = min(self.first_share, self.first_tokens / tokens)
        steps = {samples}
        # A last step to little more than what was seen already would be a waste.
        while share * self.growth**0.5 < 1:
            steps.add(max(1, round(share * samples)))
            share *= self.growth
        return sorted(steps)


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
    best: State | None = None
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

        def seen(state: State) -> bool:
            known = self.evaluator.get(state)
            return known is not None and known.n >= self.rungs[0]

        surrogate = self.surrogate(target)
        own = self.estimates(target)
        picked: list[State] = []

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
        """Measure every target's finalists on all samples."""
        for goal in self.goals:
            found = self.estimates(goal.target)
            if found is None:
                states = proposals.lowest(self.prior, goal.target, 1, 0)
                self.evaluator.measure(states, self.rungs[0], "the pair energy's ground state")
                found = self.estimates(goal.target)
                assert found is not None
            order = np.argsort(found.loss, kind="stable")
            count = min(self.plan.finalists, len(order))
            while count > 1 and not self._afford(
                found.states[order[:count]], self.rungs[-1], final=True
            ):
                count -= 1
            self.evaluator.measure(
                found.states[order[:count]],
                self.rungs[-1],
                f"remove {goal.target.label}: finalists",
            )
            self._note(goal)

    # budget -------------------------------------------------------------------------------

    def _reserve(self) -> float:
        """What the finalists of every target may still cost."""
        n = self.evaluator.blocks
        each = sum((n - g.target.low) / n for g in self.goals)
        return self.plan.finalists * each * 0.8

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


def _stack(states: Sequence[State], n: int) -> States:
    return np.array(states, dtype=bool).reshape(-1, n)


def greedy_price(n: int, remove: int) -> float:
    """Passes that a greedy path of ``remove`` of ``n`` blocks takes, prefixes shared."""
    state = np.zeros(n, dtype=bool)
    total = 0
    for step in range(remove):
        total += tree_nodes(proposals.flips(state)[~state])
        # The price depends a little on which blocks go; evenly spread ones stand for them.
        state[np.flatnonzero(~state)[(step * 7) % int((~state).sum())]] = True
    return total / n
