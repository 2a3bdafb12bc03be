import numpy as np
import pytest

from isingcut.errors import InfeasibleError, InputError, UnknownNameError
from isingcut.ising import constraints as con
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.problem import Problem
from isingcut.ising.solvers import solve


def hamiltonian(n, seed=0):
    rng = np.random.default_rng(seed)
    return Hamiltonian.from_quadratic(rng.normal(size=(n, n)))


N = 12


@pytest.mark.parametrize("diverse", [1, 2, 3])
def test_diverse_states_are_each_the_best_at_their_distance(diverse):
    problem = Problem(hamiltonian(N, 3), [con.count(N, 4)])
    spectrum = solve(problem, "exact", k=6, diverse=diverse)
    every = solve(problem, "exact", k=495)
    wanted = every.diverse(diverse)[:6]
    np.testing.assert_array_equal(spectrum.states, every.states[wanted])
    assert spectrum.proven


def test_infeasible_problems_say_why():
    problem = Problem(hamiltonian(N), [con.count(N, 2), *con.drop(N, [0, 1, 2])])
    for solver in ("exact", "tabu", "auto"):
        with pytest.raises(InfeasibleError, match=r"count .*drop 0"):
            solve(problem, solver)


def test_unknown_solvers_and_options_are_refused():
    problem = Problem(hamiltonian(4), [con.count(4, 2)])
    with pytest.raises(UnknownNameError, match="did you mean 'tabu'"):
        solve(problem, "taboo")
    with pytest.raises(InputError, match="heat"):
        solve(problem, "tabu", heat=3)
    with pytest.raises(InputError, match="k must be"):
        solve(problem, k=0)


def test_tabu_depends_on_nothing_but_seed_and_options():
    problem = Problem(hamiltonian(30), [con.count(30, 12)])
    a = solve(problem, "tabu", restarts=3, steps=50, seed=5)
    b = solve(problem, "tabu", restarts=3, steps=50, seed=5)
    np.testing.assert_array_equal(a.states, b.states)


WIDE = Problem(hamiltonian(60), [con.count(60, 30)])


def test_exact_stops_at_its_limit_and_says_so():
    # Proving the top 20 of this family takes minutes.
    spectrum = solve(WIDE, "exact", seconds=0.2)
    assert spectrum.info["stopped"] == "time limit"
    assert not spectrum.proven
    assert len(spectrum) == 20
    assert spectrum.lower_bound < spectrum.energies[0]
    assert solve(WIDE, "auto", seconds=0.2).info["stopped"] == "time limit"


def test_tabu_stops_at_its_limit():
    assert solve(WIDE, "tabu", restarts=10**6, seconds=0.05).info["restarts"] < 10**6


@pytest.mark.parametrize(
    ("name", "instead"), [("anneal", "AnnealingSampler"), ("exhaustive", "use exact")]
)
def test_a_solver_that_is_gone_names_what_replaces_it(name, instead):
    with pytest.raises(UnknownNameError, match=f"{name}.*{instead}"):
        solve(WIDE, name)


def test_all_rounds_of_diverse_states_share_one_limit(monkeypatch):
    from isingcut.ising.solvers.tabu import Tabu

    given, clock = [], iter(range(1000))
    plain = Tabu.solve

    def look(self, problem, k):
        given.append(self.seconds)
        return plain(self, problem, k)

    monkeypatch.setattr(Tabu, "solve", look)
    monkeypatch.setattr("isingcut.ising.solvers.time.perf_counter", lambda: next(clock) * 1.0)
    spectrum = solve(Problem(hamiltonian(12), [con.count(12, 5)]), "tabu", diverse=5, seconds=4.5)
    # A second passes whenever the clock is read: 4.5 s are over before all states are found.
    assert given[0] == 4.5
    assert given == sorted(given, reverse=True)
    assert all(0 < seconds <= 4.5 for seconds in given)
    assert not spectrum.proven


@pytest.mark.parametrize("k", [0, -1, 10**9])
def test_the_number_of_states_is_bounded(k):
    with pytest.raises(InputError, match="k must be from 1 to 100,000"):
        solve(WIDE, "tabu", k=k)


class Odd:
    """A solver of others that returns no solution."""

    result = None

    def solve(self, problem, k):
        return self.result


def test_what_is_no_solution_is_refused(monkeypatch):
    from isingcut.ising.solvers import registry
    from isingcut.ising.solvers.base import Solution

    monkeypatch.setitem(registry._registered, "odd", Odd)
    for result, message in {
        None: "returned NoneType; expected a Solution",
        Solution(np.zeros((2, 3), dtype=bool)): r"shape \(2, 3\); expected .* \(S, 60\)",
        Solution(np.zeros((0, 60), dtype=bool)): "found no state that satisfies",
    }.items():
        monkeypatch.setattr(Odd, "result", result)
        with pytest.raises(InputError, match=message):
            solve(WIDE, "odd")
