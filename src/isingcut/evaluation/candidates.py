"""Measure the candidates of a spectrum, and how well the energy ranks measured losses."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from isingcut.data.tokens import TokenSet
from isingcut.errors import InfeasibleError
from isingcut.files.results import without_infinities
from isingcut.files.states import (
    CandidatesFile,
    ChosenState,
    Correlations,
    Judged,
    MeasuredLoss,
    MeasuredState,
)
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.problem import Problem
from isingcut.ising.spectrum import Spectrum
from isingcut.ising.states import Bools, Floats, States, blocks_of, key_of
from isingcut.measure.losses import Measurement, measure, standard_error
from isingcut.measure.work import Work
from isingcut.models.replay import Replay
from isingcut.options.choose import ChoiceOptions

LEAST = 4
"""Minimum number of samples to measure random states on, if the text has that many."""


def rank(
    replay: Replay,
    tokens: TokenSet,
    problem: Problem,
    spectrum: Spectrum,
    others: Mapping[str, Hamiltonian],
    config: ChoiceOptions,
    work: Work,
) -> CandidatesFile:
    """Measure the spectrum's states and random states, and choose one.

    Args:
        tokens: the ranking split, which the energy does not use.
        others: further energies by name, compared on the same states.
        config: options of the run. ``random_states`` (fewer if fewer exist) are measured on
            `few_samples` of the split, because rank correlations need less text than the choice of
            the best; 0 skips the rank correlations. ``choose="ground"`` takes the ground state,
            anything else the candidate of lowest KL.
    """

    description = f"measuring {len(spectrum)} candidates"
    measured = measure(replay, tokens, spectrum.states, work, description)
    drawn, distribution = random_feasible(
        problem, config.random_states, config.seed, spectrum.states
    )
    # Candidates and random states are compared on the same tokens. If all states are candidates,
    # their full measurement is used.
    few = list(range(tokens.samples))
    random = []
    if len(drawn):
        few = few_samples(tokens.samples)
        journal = work.journal and work.journal.with_name("random.journal")
        own = replace(work, journal=journal)
        description = f"measuring {len(drawn)} random states"
        random = [measure(replay, tokens.select(few), drawn, own, description)]
    judged_on = [measured.of_samples(few), *random] if config.random_states else []
    chosen = 0
    why = "ground"
    if config.choose != why:
        chosen = int(np.argmin(measured.kl))
        why = "lowest measured KL"
    energy = problem.hamiltonian
    rows = _rows(measured, energy, tokens.rows_by_part)
    above = measured.kl_sums - measured.kl_sums[np.argmin(measured.kl)]
    for row, error in zip(rows, standard_error(above, measured.counts), strict=True):
        row.above_lowest_se = without_infinities(float(error))
    return CandidatesFile(
        remove=config.removal,
        unit="nats/token",
        energy_unit=energy.unit,
        samples=len(measured.counts),
        tokens=int(measured.counts.sum()),
        candidates=rows,
        random=[row for one in random for row in _rows(one, energy, {})],
        random_tokens=sum(int(one.counts.sum()) for one in random),
        random_distribution=distribution,
        fidelity=_correlate(energy, judged_on),
        fidelity_of_others={
            name: _correlate(other, judged_on) for name, other in others.items()
        },
        chosen=ChosenState(**rows[chosen].content(), position=chosen, why=why),
        original={
            "nll": float(measured.original_nll_sums.sum() / measured.counts.sum())
        },
        proven=spectrum.proven,
        solver=spectrum.solver,
    )


def _rows(
    measured: Measurement, energy: Hamiltonian, parts: Mapping[str, Sequence[int]]
) -> list[MeasuredState]:
    """Make a row per state with its losses, and its losses on each source of a mixture."""
    of_part = {name: measured.of_samples(own) for name, own in parts.items()}
    rows = []
    for s, state in enumerate(measured.states):
        row = measured.losses(s)
        if of_part:
            row["parts"] = {
                k: MeasuredLoss(**own.losses(s)) for k, own in of_part.items()
            }
        energy_of = energy.energy(state)
        rows.append(MeasuredState(removed=blocks_of(state), energy=energy_of, **row))
    return rows


def _correlate(energy: Hamiltonian, measured: Sequence[Measurement]) -> Judged:
    """Correlate an energy with the losses of candidates and random states, in this order."""

    def of(loss: str, some: Sequence[Measurement]) -> Correlations:
        energies = [energy.energies(m.states) for m in some]
        losses = [getattr(m, loss) for m in some]
        return fidelity(np.hstack([[], *energies]), np.hstack([[], *losses]))

    return Judged(
        kl=of("kl", measured),
        nll=of("nll", measured),
        kl_random_only=of("kl", measured[1:]),
    )


def few_samples(samples: int) -> list[int]:
    """Return the indices of the samples for random states: a quarter of all, evenly spaced."""
    few = max(samples // 4, min(samples, LEAST))
    picks = np.linspace(0, samples - 1, few).round()
    return [int(pick) for pick in picks]


def random_feasible(
    problem: Problem, count: int, seed: int, besides: States
) -> tuple[States, str]:
    """Draw distinct feasible states outside ``besides``; return them and their distribution.

    They are uniform over the feasible states of each size, by rejection. If the constraints reject
    nearly every draw, the remaining states are ground states of random fields. The distribution is
    a text.
    """
    rng = np.random.default_rng([seed, 0x5EED])
    low, high = problem.cardinality
    seen = {key_of(s) for s in besides}
    states: list[Bools] = []

    def add(state: Bools) -> None:
        if len(states) < count and key_of(state) not in seen:
            seen.add(key_of(state))
            states.append(state)

    for _ in range(200):
        if len(states) == count:
            break
        sizes = rng.integers(low, high + 1, 512)
        keys = rng.random((512, problem.n)).argsort(1).argsort(1)
        draws = keys < sizes[:, None]
        fit = draws[problem.feasible(draws)]
        # With few states, nearly every draw is a duplicate.
        _, first = np.unique(np.packbits(fit, axis=1), axis=0, return_index=True)
        for i in np.sort(first):
            add(fit[i])
    distribution = "uniform over the feasible states" + " of each size" * (low < high)
    if len(states) < count:
        before = len(states)
        for _ in range(4 * count):
            field = Hamiltonian(
                rng.standard_normal(problem.n), np.zeros((problem.n, problem.n))
            )
            try:
                add(Problem(field, problem.constraints).a_state())
            except InfeasibleError:
                break
        if len(states) > before:
            others = len(states) - before
            distribution = f"{before} uniform, {others} ground states of random fields"
    return np.array(states, dtype=bool).reshape(-1, problem.n), distribution


def fidelity(energies: Floats, losses: Floats) -> Correlations:
    """Correlate energies with measured losses: Spearman with a 95 % interval.

    The interval is by the bootstrap over states, 1,000 resamples.

    Args:
        energies: (S,) energies of the states.
        losses: (S,) measured losses.

    Returns:
        the correlation and its interval; None if undefined (fewer than three states, or all tied).
    """
    n = len(energies)
    value = None
    low = None
    high = None
    if n >= 3:
        picks = np.random.default_rng([0, 0xF1DE]).integers(0, n, (1000, n))
        whole, *drawn = _spearman(energies, losses, np.vstack([np.arange(n), picks]))
        if not np.isnan(whole):
            value = float(whole)
            low, high = map(float, np.nanpercentile(drawn, [2.5, 97.5]))
    return Correlations(n=n, spearman=value, spearman_low=low, spearman_high=high)


def _spearman(a: Floats, b: Floats, picks: NDArray[np.int64]) -> Floats:
    """Compute (P,) Spearman's rho of the resamples ``picks`` (P, S); NaN if all values are tied."""
    from scipy.stats import ConstantInputWarning, pearsonr, rankdata

    ranks = [rankdata(x[picks], axis=1) for x in (a, b)]
    with warnings.catch_warnings(action="ignore", category=ConstantInputWarning):
        rho: Floats = pearsonr(*ranks, axis=1).statistic
    return rho
