"""Patch candidates for the choice: those of lowest KL and, in a deep cut, states found by a search.

A least-squares patch changes the KL of two near candidates by more than they differ. In a deep cut
the KL of exact cuts is a poor guide altogether: states that a patch repairs well are much worse as
cut (docs/experiments/deep.md). So the search there measures states after a patch of little text:

    states of the energy, its search and one pass  ->  measured, patched
    the best of them with each block in turn removed or restored  ->  the effect of each block
    rounds: exchanges around the best state, those with the lowest sum of effects first; then the
        effects of the blocks that the best exchanges of the best state move, until a better one is
        unlikely, by the errors of the sums so far
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from scipy.special import log_ndtr

from isingcut.console.progress import Progress
from isingcut.data.tokens import TokenSet
from isingcut.energies.search.proposals import Target, flip_each, list_exchanges
from isingcut.energies.search.search import CHANCE, GAIN
from isingcut.files import states
from isingcut.healing.patch.files import runs
from isingcut.ising.problem import Problem
from isingcut.ising.states import Bools, Floats, States, blocks_of, key_of
from isingcut.measure.ledger import Ledger
from isingcut.measure.packed import changed_losses
from isingcut.measure.streams import Kept
from isingcut.options.choose import ChoiceOptions
from isingcut.runs.cutting import Fit, fit_patch

NEAR = 0.05
ERRORS = 2
TRIED = 3
LESS = 8
"""Candidates to patch for the choice: maximum distance from the lowest KL, as a share of that or in
paired standard errors; maximum number; factor by which their patches take fewer tokens."""
DEEP = 0.4
"""Share of removed blocks from which on a cut is deep."""
ROUND = 4
MOVES = 16
MORE = 40
TOKENS = 2048
ERROR = 0.01
"""The search in a deep cut: number of states that start it, and per round; exchanges whose blocks
are measured again; states beyond the number of blocks after which it ends; tokens to fit the patch
of each state, and to measure it; and the error of a sum of effects, as a share of the KL, that
counts as much as a round of measured ones."""


def trial_tokens(config: ChoiceOptions) -> int:
    """Return the number of tokens for patches of near candidates; 0 if none are patched."""
    patched = config.choose == "measured" and config.patch != "none"
    return max(64, config.patch_tokens // LESS) if patched else 0


def is_deep(removed: int, blocks: int) -> bool:
    """Whether so many blocks are removed that the lowest KL of exact cuts is a poor guide."""
    return removed >= DEEP * blocks


def is_searched(
    config: ChoiceOptions, removed: int, blocks: int, *, streamed: bool
) -> bool:
    """Whether states are searched by their patched KL: deep cuts of a model in memory, if trial
    patches take more tokens than those of the search (not with ``--quick``)."""
    return is_deep(removed, blocks) and trial_tokens(config) > TOKENS and not streamed


class Trials:
    """Measures states after a patch.

    Args:
        fit: what the patches are fitted with.
        text: text to measure on.
        journal: file that keeps each measurement.
        progress: display of one measurement.
    """

    def __init__(
        self, fit: Fit, text: TokenSet, journal: Path, progress: Progress
    ) -> None:
        context = fit.context
        self.fit = fit
        self.text = text
        self._progress = progress
        self._work = dataclasses.replace(context.work(journal), progress=progress)
        self._ledger = Ledger(context.replay, text, self._work)
        self._fitted = Kept()
        self._measured = Kept()

    def kl(self, removed: Sequence[int], kind: str, tokens: int) -> float:
        """Return the KL of a state after a patch of a kind, fitted on so many tokens."""
        # With `--heal` a patch would be least-squares only, but a tuned one predicts the healing.
        fit = dataclasses.replace(self.fit, repair=kind, tokens=tokens)
        cuts = runs(removed) if kind == "linear" else []
        known = {last + 1: tuple(cuts[: k + 1]) for k, (_, last) in enumerate(cuts)}

        def make() -> Floats:
            new = fit_patch(fit, removed, self._progress, self._fitted)
            return changed_losses(
                fit.context.replay,
                self.text,
                lambda name, _: new.get(name),
                self._work,
                f"without {', '.join(map(str, removed))}, patched",
                removed,
                self._measured,
                known,
            )

        key = f"{list(removed)}:{kind}:{tokens}"
        sums = self._ledger.measure_once(key, 0.0, 0.0, make)
        return float(sums.sum() / self._ledger.counts.sum())


def search_patched(trials: Trials, problem: Problem, start: States) -> list[list[int]]:
    """Search for states of low KL after a least-squares patch, by steepest descent over exchanges.

    The effect of a block is the change of the KL when it alone is removed or restored. Effects of
    one state nearly add up (docs/experiments/deep.md), but differ between states.

    Args:
        trials: measures on the first `TOKENS` tokens.
        start: (S, N) states; the first `ROUND` distinct ones are measured first.

    Returns:
        the removed blocks of the best two states.

    Complexity: N + 8 to N + `MORE` states.
    """
    context = trials.fit.context
    target = Target("", problem.constraints)
    states = dict[str, Bools]()
    kl = dict[str, float]()
    effects = np.zeros(problem.n)
    with context.progress("searching patched states", problem.n + MORE) as bar:

        def measure(state: Bools) -> float:
            key = key_of(state)
            if key not in kl:
                states[key] = state
                kl[key] = trials.kl(blocks_of(state), "linear", TOKENS)
                bar.advance(1, f"KL {kl[key]:.4f}")
            return kl[key]

        def best() -> list[Bools]:
            fits = target.feasible(np.array(list(states.values())))
            return [
                states[key]
                for key in sorted(np.array(list(kl))[fits], key=kl.__getitem__)
            ]

        def guess() -> States:
            """Return unmeasured exchanges around the best state, the lowest guess first."""
            near = list_exchanges(centre, target)
            known = np.array([key_of(state) in kl for state in near], dtype=bool)
            order = np.argsort((near[~known] ^ centre) @ effects, kind="stable")
            return np.asarray(near[~known][order])

        def chance() -> float:
            """Return the chance that an exchange is lower than the best state by more than `GAIN`,
            if sums of effects have independent normal errors like those measured."""
            lowest = measure(centre)
            errors = [*surprises, *[ERROR * lowest] * ROUND]
            spread = np.sqrt(np.mean(np.square(errors)))
            higher = (guess() ^ centre) @ effects + GAIN * lowest
            return float(1 - np.exp(log_ndtr(higher / spread).sum()))

        for state in list({key_of(state): state for state in start}.values())[:ROUND]:
            measure(state)
        centre = best()[0]
        surprises = list[float]()
        moves = None
        while len(kl) < problem.n + MORE:
            lowest = measure(centre)
            # The last first, so that the blocks before it are still kept.
            for i in np.flatnonzero((guess()[:moves] ^ centre).any(0))[::-1]:
                effects[i] = measure(flip_each(centre)[i]) - lowest
            if chance() <= CHANCE:
                break
            for state in guess()[:ROUND]:
                change = float((state ^ centre) @ effects)
                surprises.append(measure(state) - lowest - change)
            # Removing a block undoes restoring it.
            effects[best()[0] ^ centre] *= -1
            centre = best()[0]
            moves = MOVES
    return [blocks_of(state) for state in best()[:2]]


def choose_by_patch(
    ranking: states.CandidatesFile,
    deep: bool,
    config: ChoiceOptions,
    patched_kl: Callable[[Sequence[int], str, int], float],
    searched: Sequence[list[int]],
) -> list[int]:
    """Choose among the candidates near the lowest, by their KL after a patch.

    In a deep cut the kind of patch is that of the run, because least squares does not predict which
    state training will repair best. The candidates are then the one of lowest KL, the best state of
    the one-pass methods, and those of the search over patched states. The latter are the lowest of
    many on little text, so one is chosen only if it is lower by more than `NEAR` than the one of
    lowest KL. `patched_kl` is set in the rows of the patched candidates.

    Args:
        ranking: the ranked candidates.
        deep: whether the cut is deep.
        patched_kl: as `Trials.kl`.
        searched: the result of `search_patched`; empty without such a search.

    Returns:
        the indices of the patched candidates, the chosen first; one index if no other is near.
    """
    rows = ranking.candidates
    lowest = min(row.kl for row in rows)

    def is_near(row: states.MeasuredState) -> bool:
        return row.kl - lowest <= max(
            NEAR * lowest, ERRORS * (row.above_lowest_se or 0)
        )

    near = [i for i, row in enumerate(rows) if is_near(row)]
    near = sorted(near, key=lambda i: rows[i].kl)[: 1 if searched else TRIED]
    if deep:
        quick = ranking.one_pass.states if ranking.one_pass else []
        best = [min(quick, key=lambda row: row.kl).removed] if quick else []
        more = [*searched, *best]
        near += [
            i for i, row in enumerate(rows) if row.removed in more and i not in near
        ]
    if len(near) == 1:
        return near
    kind = config.patch if deep else "linear"
    count = trial_tokens(config)
    for row in (rows[i] for i in near):
        row.patched_kl = patched_kl(row.removed, kind, count)
    kl = {i: rows[i].patched_kl or 0.0 for i in near}
    first = near[0]
    near = sorted(near, key=kl.__getitem__)
    if rows[near[0]].removed in searched and kl[first] <= (1 + NEAR) * kl[near[0]]:
        near = [first, *(i for i in near if i != first)]
    return near
