"""Ranking: random states, fidelity figures, the choice."""

import numpy as np
import pytest
from scipy import stats

from isingcut.energies.pairwise import Pairwise
from isingcut.errors import InputError
from isingcut.evaluation.candidates import few_samples, fidelity, random_feasible, rank
from isingcut.ising.constraints import LinearConstraint, count, keep
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.problem import Problem
from isingcut.ising.solvers import solve
from isingcut.ising.states import states_of
from isingcut.measure.losses import measure
from isingcut.measure.work import Work
from isingcut.options.config import RunConfig
from tiny import random_tokens, tiny_replay


def flat(n, *rows):
    return Problem(Hamiltonian(np.zeros(n), np.zeros((n, n))), rows)


def test_fidelity_is_spearman_and_kendall_of_scipy():
    rng = np.random.default_rng(0)
    a = rng.standard_normal(40)
    b = a + rng.standard_normal(40)
    found = fidelity(a, b)
    assert found.spearman == pytest.approx(stats.spearmanr(a, b).statistic)
    assert found.kendall == pytest.approx(stats.kendalltau(a, b).statistic)
    assert found.spearman_low < found.spearman < found.spearman_high
    assert found.n == 40


def test_fidelity_of_ties_only_is_undefined_and_not_a_number_made_up():
    assert fidelity(np.ones(5), np.arange(5.0)).spearman is None


def test_random_states_are_feasible_distinct_new_and_uniform():
    problem = flat(8, count(8, 3), *keep(8, [0]))
    besides = np.zeros((1, 8), dtype=bool)
    besides[0, 1:4] = True
    states, words = random_feasible(problem, 34, 0, besides)
    assert len(np.unique(states, axis=0)) == len(states) == 34
    assert problem.feasible(states).all()
    assert not (states == besides).all(1).any()
    assert words == "uniform over the feasible states"
    again, _ = random_feasible(problem, 34, 0, besides)
    np.testing.assert_array_equal(states, again)


def test_there_are_never_more_random_states_than_exist():
    problem = flat(5, count(5, 1))
    states, _ = random_feasible(problem, 30, 0, np.zeros((0, 5), dtype=bool))
    assert len(states) == 5


def test_rare_feasible_states_are_found_and_their_origin_is_said():
    # One state in 2^20 or so satisfies all of these ties.
    n = 40
    ties = []
    for i in range(0, n, 2):
        row = np.zeros(n)
        row[i], row[i + 1] = 1, -1
        ties.append(LinearConstraint(f"tie {i}", row, "==", 0, "pairs go together"))
    problem = flat(n, count(n, 20), *ties)
    states, words = random_feasible(problem, 30, 0, np.zeros((0, n), dtype=bool))
    assert len(states) == 30
    assert problem.feasible(states).all()
    assert "random fields" in words


@pytest.fixture
def ranked():
    """A replay, twenty samples to rank on, a problem, its spectrum and options of `rank`."""
    replay, tokens = tiny_replay(), random_tokens([16] * 24)
    energy = Pairwise().measure(replay, tokens.select(range(4)), Work())
    problem = Problem(energy, [count(len(replay), 2)])
    spectrum = solve(problem, k=6)
    options = {"seed": 0, "work": Work(), "choose": "measured"}
    return replay, tokens.select(range(4, 24)), problem, spectrum, options


def test_the_lowest_measured_candidate_is_chosen(ranked):
    replay, split, problem, spectrum, options = ranked
    found = rank(replay, split, problem, spectrum, random_states=30, **options)
    assert found.chosen.kl == min(row.kl for row in found.candidates)
    assert found.candidates[found.chosen.position].removed == found.chosen.removed
    assert len(found.candidates) == 6
    assert found.fidelity.kl.n == 6 + len(found.random)
    options["choose"] = "ground"
    ground = rank(replay, split, problem, spectrum, random_states=0, **options)
    assert ground.chosen.position == 0


def test_random_states_take_a_quarter_of_the_text_and_are_compared_on_it(ranked):
    replay, split, problem, spectrum, options = ranked
    assert few_samples(16) == [0, 5, 10, 15]
    assert few_samples(3) == [0, 1, 2]
    assert len(few_samples(400)) == 100
    found = rank(replay, split, problem, spectrum, random_states=30, **options)
    few = split.select(few_samples(split.samples))
    assert (few.samples, found.random_tokens) == (5, few.tokens)
    # The same figures from a measurement of its own.
    drawn = states_of(problem.n, [row.removed for row in found.random])
    states = np.concatenate([spectrum.states, drawn])
    kl = measure(replay, few, states).kl
    expected = fidelity(problem.hamiltonian.energies(states), kl)
    assert dict(found.fidelity.kl) == pytest.approx(dict(expected))
    assert [r.kl for r in found.random] == pytest.approx(kl[len(spectrum) :])
    whole = measure(replay, split, spectrum.states).kl
    assert [r.kl for r in found.candidates] == pytest.approx(whole)


def test_without_random_states_the_energy_is_not_judged(ranked):
    replay, split, problem, spectrum, options = ranked
    options["others"] = {"other": problem.hamiltonian}
    found = rank(replay, split, problem, spectrum, random_states=0, **options)
    assert found.random == []
    for judged in (found.fidelity, found.fidelity_of_others["other"]):
        for j in (judged.kl, judged.nll, judged.kl_random_only):
            assert (j.n, j.spearman, j.kendall) == (0, None, None)
    assert found.chosen.kl == min(row.kl for row in found.candidates)


def test_a_few_random_states_are_refused():
    with pytest.raises(InputError, match="--random-states must be 0 or at least 30, got 29"):
        RunConfig(random_states=29)
