"""Ranking: random states, fidelity figures, the choice."""

import numpy as np
import pytest
from scipy import stats

from isingcut.data.tokens import TokenSet
from isingcut.energies.pairwise import Pairwise
from isingcut.evaluation.candidates import fidelity, random_feasible, rank, to_dict
from isingcut.ising.constraints import LinearConstraint, count, keep
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.problem import Problem
from isingcut.ising.solvers import solve
from isingcut.measure.work import Work
from isingcut.models.architectures import find_stack, stack_modules
from isingcut.models.replay import Replay
from tiny import tiny_model


def flat(n: int, *rows) -> Problem:
    return Problem(Hamiltonian(np.zeros(n), np.zeros((n, n))), rows)


def test_fidelity_is_spearman_and_kendall_of_scipy():
    rng = np.random.default_rng(0)
    a = rng.standard_normal(40)
    b = a + rng.standard_normal(40)
    found = fidelity(a, b)
    assert found["spearman"] == pytest.approx(stats.spearmanr(a, b).statistic)
    assert found["kendall"] == pytest.approx(stats.kendalltau(a, b).statistic)
    assert found["spearman_low"] < found["spearman"] < found["spearman_high"]
    assert found["n"] == 40


def test_fidelity_of_ties_only_is_undefined_and_not_a_number_made_up():
    assert fidelity(np.ones(5), np.arange(5.0))["spearman"] is None


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


def test_the_lowest_measured_candidate_is_chosen():
    model = tiny_model("llama").requires_grad_(False)
    replay = Replay(model, stack_modules(model, find_stack(model)))
    rng = np.random.default_rng(0)
    tokens = TokenSet.from_rows(rng.integers(8, 200, (8, 16)).tolist())
    energy = Pairwise().measure(replay, tokens.select(range(4)), Work())
    problem = Problem(energy, [count(len(replay), 2)])
    spectrum = solve(problem, k=6)
    options = {"random_states": 30, "seed": 0, "work": Work()}
    split = tokens.select(range(4, 8))
    found = rank(replay, split, problem, spectrum, choose="measured", **options)
    kl = found.measured.kl
    assert kl[found.chosen] == kl[:6].min()
    ground = rank(replay, split, problem, spectrum, choose="ground", **options)
    assert ground.chosen == 0
    content = to_dict(found, energy, {}, "2")
    assert content["chosen"]["removed"] == found.removed
    assert len(content["candidates"]) == 6
    assert content["fidelity"]["kl"]["n"] == len(kl)
