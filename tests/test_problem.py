import subprocess
import sys

import numpy as np
import pytest

from isingcut.errors import InfeasibleError, InputError
from isingcut.ising import constraints as con
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.problem import Problem


def hamiltonian(n, seed=0):
    rng = np.random.default_rng(seed)
    return Hamiltonian.from_quadratic(rng.normal(size=(n, n)))


def all_states(n):
    return (np.arange(2**n)[:, None] >> np.arange(n)) & 1


def test_feasible_and_violations():
    problem = Problem(hamiltonian(4), [con.count(4, 2), *con.keep(4, [0])])
    np.testing.assert_array_equal(problem.feasible([[0, 1, 1, 0], [1, 1, 0, 0]]), [True, False])
    assert problem.violations([0, 1, 1, 0]) == []
    broken = problem.violations([1, 1, 1, 0])
    assert [text.split(" (")[0] for text in broken] == ["count", "keep 0"]


def test_row_length_must_fit():
    with pytest.raises(InputError, match="is for 5 blocks"):
        Problem(hamiltonian(4), [con.count(5, 2)])


def test_conflicting_constraints_are_named_and_no_others():
    rows = [
        con.count(6, 2),
        con.budget("params", np.ones(6), share=0.5),
        *con.keep(6, [0]),
        con.keep_at_least(["attention"] * 6, "attention"),
    ]
    with pytest.raises(InfeasibleError) as caught:
        Problem(hamiltonian(6), rows).check()
    text = str(caught.value)
    assert "count" in text
    assert "budget params" in text
    assert "keep 0" not in text
    assert "attention" not in text


def test_budgets_in_bytes_conflict_too():
    rows = [con.count(6, 2), con.budget("bytes", np.full(6, 3e9), amount=7e9)]
    with pytest.raises(InfeasibleError, match="budget bytes"):
        Problem(hamiltonian(6), rows).check()
    rows[1] = con.budget("bytes", np.full(6, 3e9), amount=6e9)
    Problem(hamiltonian(6), rows).check()


def test_a_state_is_feasible():
    rows = [con.count(8, 3), con.budget("b", np.arange(8.0), amount=17), *con.keep(8, [5])]
    problem = Problem(hamiltonian(8), rows)
    assert problem.violations(problem.a_state()) == []


def test_cardinality():
    costs = np.array([1.0, 2.0, 3.0, 4.0])
    problem = Problem(hamiltonian(4), [con.budget("b", costs, amount=5), *con.keep(4, [0])])
    assert problem.cardinality == (2, 3)
    assert Problem(hamiltonian(4)).cardinality == (0, 4)


def test_cqm_round_trip():
    rows = [con.count(5, 2), con.budget("b", np.arange(5.0), amount=3), *con.keep(5, [1])]
    problem = Problem(hamiltonian(5), rows)
    back = Problem.from_cqm(problem.to_cqm())
    x = all_states(5)
    np.testing.assert_allclose(
        back.hamiltonian.energies(x), problem.hamiltonian.energies(x), atol=1e-12
    )
    np.testing.assert_array_equal(back.feasible(x), problem.feasible(x))


def test_cqm_with_quadratic_constraint_is_refused():
    import dimod

    cqm = dimod.ConstrainedQuadraticModel()
    x, y = dimod.Binaries(["x", "y"])
    cqm.set_objective(x + y)
    cqm.add_constraint(x * y <= 0, label="both")
    with pytest.raises(InputError, match="not linear"):
        Problem.from_cqm(cqm)


@pytest.mark.parametrize("sense", ["<=", ">="])
def test_penalty_form_agrees_on_feasible_states_and_its_minimum_is_feasible(sense):
    import dimod

    weights = con.LinearConstraint("w", np.array([1.0, 2.0, 1.0, 3.0, 2.0]), sense, 4.0)
    problem = Problem(hamiltonian(5), [con.count(5, 2), weights])
    bqm, penalty = problem.to_bqm()
    assert penalty > 0
    sample = dimod.ExactSolver().sample(bqm).first
    state = np.array([[sample.sample[i] for i in range(5)]])
    assert problem.feasible(state)[0]
    x = all_states(5)
    x = x[problem.feasible(x)]
    assert sample.energy == pytest.approx(problem.hamiltonian.energies(x).min(), abs=1e-9)


def test_the_core_is_light():
    code = (
        "import sys\nimport isingcut.ising.hamiltonian\n"
        "import isingcut.ising.constraints\n"
        "import isingcut.ising.problem\nimport isingcut.ising.spectrum\n"
        "import isingcut.ising.solvers\n"
        "print([m for m in ('torch', 'numba', 'dimod', 'scipy') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
