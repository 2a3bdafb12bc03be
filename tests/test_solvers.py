from dataclasses import dataclass

import numpy as np
import pytest
from dwave.samplers import SimulatedAnnealingSampler, TabuSampler

from isingcut.errors import InfeasibleError, InputError, UnknownNameError, VerificationError
from isingcut.ising import constraints as con
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.problem import Problem
from isingcut.ising.solvers import make, registry, solve
from isingcut.ising.solvers.base import Solution, Solver
from isingcut.ising.solvers.dimod import repair
from isingcut.testing.solvers import check_solver


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


@pytest.mark.parametrize("name", ["exact", "auto"])
def test_solvers_with_a_proof(name):
    assert check_solver(make(name)) == {
        "ground_states_found": 1.0,
        "k_best_found": 1.0,
        "proofs": 1.0,
    }


def test_tabu():
    figures = check_solver(make("tabu"))
    assert figures["ground_states_found"] == 1.0
    assert figures["k_best_found"] > 0.8


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dimod", {"sampler": SimulatedAnnealingSampler, "reads": 50}),
        ("dimod", {"sampler": TabuSampler, "reads": 5, "options": {"timeout": 5}}),
        ("dimod:dimod.ExactCQMSolver", {}),
    ],
    ids=["annealing", "tabu", "named"],
)
def test_dimod_samplers(name, options):
    figures = check_solver(make(name, **options))
    assert figures["ground_states_found"] > 0.7
    assert figures["proofs"] == 0


def test_every_part_is_a_solver():
    for name in registry.names():
        assert isinstance(registry.get(name)(), Solver)


class AllOnes:
    """A sampler that ignores the problem."""

    parameters = ()

    def sample(self, bqm):
        import dimod

        return dimod.SampleSet.from_samples_bqm([dict.fromkeys(bqm.variables, 1)], bqm)


@pytest.mark.parametrize("sampler", [AllOnes, AllOnes()], ids=["class", "instance"])
def test_infeasible_samples_are_repaired_and_counted(sampler):
    rng = np.random.default_rng(0)
    problem = Problem(Hamiltonian.from_quadratic(rng.normal(size=(8, 8))), [con.count(8, 3)])
    spectrum = solve(problem, "dimod", k=5, sampler=sampler)
    assert len(spectrum) == 1
    assert spectrum.info["repaired"] == 1
    assert spectrum.info["dropped"] == 0
    assert spectrum.info["ignored"] == ["num_reads", "seed"]
    assert spectrum.states.sum() == 3


class Exits(AllOnes):
    """Raises in the middle of this process's work."""

    def __init__(self, error):
        self.error = error

    def sample(self, bqm):
        raise self.error


def test_what_a_sampler_raises_is_one_error_but_an_interrupt_is_the_users():
    problem = Problem(Hamiltonian(np.zeros(3), np.zeros((3, 3))), [con.count(3, 1)])
    with pytest.raises(InputError, match=r"the sampler Exits failed: SystemExit: 3"):
        make("dimod", sampler=Exits(SystemExit(3))).solve(problem, 1)
    with pytest.raises(KeyboardInterrupt):
        make("dimod", sampler=Exits(KeyboardInterrupt())).solve(problem, 1)


def test_a_named_class_gets_the_options_it_knows(tmp_path, monkeypatch):
    source = """
import dimod
class Low(dimod.Sampler):
    properties, parameters = {}, {"num_reads": [], "seed": [], "heat": []}
    told = None
    def sample(self, bqm, **options):
        Low.told = options
        return dimod.ExactSolver().sample(bqm)
"""
    (tmp_path / "own_samplers.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    energy = np.random.default_rng(0).normal(size=(8, 8))
    problem = Problem(Hamiltonian.from_quadratic(energy), [con.count(8, 3)])
    more = {"options": {"heat": 2, "cold": 1}}
    found = solve(problem, "dimod:own_samplers.Low", k=5, **more)
    import own_samplers

    assert own_samplers.Low.told == {"heat": 2, "num_reads": 100, "seed": 0}
    assert found.info["ignored"] == ["cold"]
    np.testing.assert_array_equal(found.states, solve(problem, "exact", k=5).states)


def test_repair_gives_up_where_no_move_helps():
    # 3 a + 3 b + 2 c = 4 has no solution, and a = b = 0, c = 1 cannot be improved.
    row = con.LinearConstraint("odd", np.array([3.0, 3.0, 2.0]), "==", 4)
    problem = Problem(Hamiltonian(np.zeros(3), np.zeros((3, 3))), [row])
    assert repair(problem, np.array([True, False, False])) is None


@dataclass(frozen=True)
class Fake:
    """A solver with one fault."""

    fault: str

    def solve(self, problem, k):
        good = make("exact").solve(problem, k)
        if self.fault == "type":
            return good.states
        if self.fault == "shape":
            return Solution(good.states[:, :3])
        if self.fault == "infeasible":
            return Solution(~good.states)
        if self.fault == "proof":
            return Solution(good.states[1:], None, True)
        if self.fault == "bound":
            return Solution(good.states, good.lower_bound + 1.0)
        raise AssertionError(self.fault)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("type", "must return a Solution"),
        ("shape", "must be bool"),
        ("infeasible", "violates"),
        ("proof", "claims a proof"),
        ("bound", "lower bound"),
    ],
)
def test_the_kit_finds_faults(fault, message):
    with pytest.raises(VerificationError, match=message):
        check_solver(Fake(fault))


def test_the_kit_wants_infeasibility_reported():
    class Silent:
        def solve(self, problem, k):
            try:
                return make("exact").solve(problem, k)
            except Exception:
                return Solution(np.zeros((0, problem.n), dtype=bool))

    with pytest.raises(VerificationError, match="must raise InfeasibleError"):
        check_solver(Silent())
