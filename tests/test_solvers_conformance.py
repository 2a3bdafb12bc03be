from dataclasses import dataclass

import numpy as np
import pytest
from dwave.samplers import SimulatedAnnealingSampler, TabuSampler

from isingcut.errors import InputError, VerificationError
from isingcut.ising import constraints as con
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.problem import Problem
from isingcut.ising.solvers import make, registry, solve
from isingcut.ising.solvers.base import Solution, Solver
from isingcut.ising.solvers.dimod import repair
from isingcut.testing.solvers import check_solver


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
        ("infeasible", "breaks"),
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
