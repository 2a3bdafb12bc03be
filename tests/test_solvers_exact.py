import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isingcut.errors import InfeasibleError, InputError
from isingcut.ising import constraints as con
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.problem import Problem
from isingcut.ising.solvers import exact, solve, tabu
from isingcut.ising.solvers._relaxation import SIGNS, Relaxation, Subproblem, spin_matrix
from isingcut.ising.solvers.base import reduce


@pytest.fixture
def tree_only(monkeypatch):
    """Almost no enumeration, so that small problems exercise the semidefinite tree."""
    monkeypatch.setattr(exact, "ROOT_BUDGET", 1)
    monkeypatch.setattr(exact, "NODE_BUDGET", 1)


def brute_force(problem, k):
    x = (np.arange(2**problem.n)[:, None] >> np.arange(problem.n)) & 1
    x = x[problem.feasible(x)]
    return np.sort(problem.hamiltonian.energies(x))[:k]


def hamiltonian(kind, n, seed):
    rng = np.random.default_rng(seed)
    if kind == "psd":
        A = rng.normal(size=(n, n)) * 10 ** rng.uniform(-1, 0.5, size=n)
        return Hamiltonian.from_quadratic(A.T @ A / n)
    if kind == "degenerate":
        Q = rng.integers(-2, 3, size=(n, n))
        return Hamiltonian.from_quadratic(Q)
    if kind == "flat":
        return Hamiltonian(np.zeros(n), np.zeros((n, n)))
    return Hamiltonian.from_quadratic(rng.normal(size=(n, n)), c=float(rng.normal()))


def apart(n):
    pairs = np.eye(n) + np.eye(n, k=1)
    return [con.LinearConstraint(f"apart {k}", pairs[k], "<=", 1) for k in range(n - 1)]


@st.composite
def problems(draw, most):
    n = draw(st.integers(2, most))
    seed = draw(st.integers(0, 10_000))
    kind = draw(st.sampled_from(["psd", "indefinite", "degenerate", "flat"]))
    rng = np.random.default_rng(seed)
    rows = []
    if draw(st.booleans()):
        rows.append(con.count(n, draw(st.integers(0, n))))
    extra = draw(
        st.sampled_from(["none", "kinds", "budget", "at most", "keep", "together", "apart"])
    )
    if extra == "kinds":
        kinds = [str(v) for v in rng.integers(0, 2, size=n)]
        half = {k: kinds.count(k) // 2 for k in set(kinds)}
        rows = con.kind_counts(kinds, half)
    elif extra == "budget":
        rows.append(con.budget("params", rng.uniform(1e6, 3e6, size=n), share=0.4))
    elif extra == "at most":
        rows.append(con.LinearConstraint("cap", rng.integers(-3, 4, size=n), "<=", 1.0))
    elif extra == "keep":
        rows += con.keep(n, [0])
    elif extra == "together":
        rows += con.together(n, [(0, n - 1)])
    elif extra == "apart":
        rows += apart(n)
    return Problem(hamiltonian(kind, n, seed), rows)


def assert_the_k_best(problem, k, **options):
    wanted = brute_force(problem, k)
    if not wanted.size:
        with pytest.raises(InfeasibleError):
            solve(problem, "exact", k=k, **options)
        return
    spectrum = solve(problem, "exact", k=k, **options)
    tolerance = 1e-9 * max(problem.hamiltonian.scale, 1.0)
    assert spectrum.proven
    assert len(spectrum) == wanted.size
    np.testing.assert_allclose(spectrum.energies, wanted, atol=tolerance)
    assert spectrum.lower_bound <= wanted[0] + tolerance


@settings(max_examples=80, deadline=None, derandomize=True)
@given(problems(12), st.sampled_from([1, 7, 40]))
def test_exact_equals_brute_force(problem, k):
    assert_the_k_best(problem, k, threads=1)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(problems(8), st.sampled_from([1, 5]))
def test_the_semidefinite_tree_equals_brute_force(problem, k):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "ROOT_BUDGET", 5)
        patch.setattr(exact, "NODE_BUDGET", 5)
        assert_the_k_best(problem, k, threads=1)


@pytest.mark.parametrize("kind", ["psd", "indefinite", "degenerate"])
@pytest.mark.parametrize("nodes", [5, 100_000], ids=["tree", "enumeration"])
def test_nothing_is_pruned_that_the_heuristic_would_have_found(monkeypatch, kind, nodes):
    # The pool starts empty: a state that a wrong bound drops is missing from the answer.
    monkeypatch.setattr(tabu, "search", lambda r, *rest: (np.zeros((0, r.n), dtype=np.uint8), 0))
    monkeypatch.setattr(exact, "ROOT_BUDGET", nodes)
    monkeypatch.setattr(exact, "NODE_BUDGET", nodes)
    cap = con.LinearConstraint("cap", np.arange(13) % 4, "<=", 7.0)
    for seed, m in enumerate((3, 5, 9)):
        ham = hamiltonian(kind, 13, seed)
        assert_the_k_best(Problem(ham, [con.count(13, m)]), 4, threads=1)
        assert_the_k_best(Problem(ham, [con.count(13, m), cap]), 4, threads=1)
        assert_the_k_best(Problem(ham, [con.count(13, 3), cap, *apart(13)]), 4, threads=1)


def test_bounds_are_bounds():
    n, m = 12, 5
    ham = hamiltonian("indefinite", n, 4)
    C = spin_matrix(ham.h, ham.J, ham.c)
    x = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
    x = x[x.sum(axis=1) == m]
    s = np.column_stack([np.ones(len(x)), 2 * x - 1.0])
    energies = ham.energies(x)
    np.testing.assert_allclose(np.einsum("si,ij,sj->s", s, C, s), energies, atol=1e-12)
    energies -= ham.c
    lowest = energies.min()
    reduced = reduce(Problem(ham, [con.count(n, m)]))
    relaxation = Relaxation(reduced, np.array([lowest + 0.1]), np.zeros(1, dtype=np.int64))
    part = Subproblem(ham.h, ham.J, np.full(n, -1, dtype=np.int8), m)
    bound, splits, dual = relaxation.bound(part, m, relaxation.start(None, part, m))
    assert lowest - 0.05 * abs(lowest) < bound <= lowest + 1e-9
    assert np.isfinite(splits).all()
    for i in range(n):
        for value in (0, 1):
            assert splits[value, i] <= energies[x[:, i] == value].min() + 1e-9
    # Multipliers handed down to a child still give a bound of the child.
    for i, value in ((0, 0), (5, 1), (11, 1)):
        fixed = np.full(n, -1, dtype=np.int8)
        fixed[i] = value
        child = dual.restrict(fixed)
        W = s[x[:, i] == value]
        a = W[:, np.delete(np.arange(n + 1), i + 1)][:, child.cuts]
        pairs = np.stack([a[..., 0] * a[..., 1], a[..., 0] * a[..., 2], a[..., 1] * a[..., 2]], -1)
        assert (1 + (pairs * SIGNS[child.kinds]).sum(axis=-1) >= 0).all()
        # On binaries the diagonal terms are constants: nothing may be lost or gained.
        assert child.x[:n].sum() == pytest.approx(dual.x[: n + 1].sum())
        assert len(child.cuts)


def test_limits_return_the_best_so_far_with_a_bound():
    problem = Problem(hamiltonian("indefinite", 60, 0), [con.count(60, 28)])
    spectrum = solve(problem, "exact", k=10, nodes=2)
    assert not spectrum.proven
    assert spectrum.info["stopped"] == "node limit"
    assert len(spectrum) == 10
    assert spectrum.lower_bound <= spectrum.energies[0]
    assert 0 < spectrum.relative_gap < 1


def test_interrupting_returns_the_best_so_far(monkeypatch):
    problem = Problem(hamiltonian("indefinite", 60, 0), [con.count(60, 28)])

    calls, wait = iter([KeyboardInterrupt]), exact.wait

    def interrupt(*arguments):
        for error in calls:
            raise error
        return wait(*arguments)

    monkeypatch.setattr(exact, "wait", interrupt)
    spectrum = solve(problem, "exact", k=10)
    assert not spectrum.proven
    assert spectrum.info["stopped"] == "interrupted"
    assert len(spectrum) == 10


def test_threads_agree(tree_only):
    problem = Problem(hamiltonian("psd", 20, 3), [con.count(20, 8)])
    one = solve(problem, "exact", k=30, threads=1)
    two = solve(problem, "exact", k=30, threads=2)
    np.testing.assert_array_equal(one.states, two.states)
    assert one.info["evaluations"] > 0


def test_open_nodes_without_multipliers_are_still_solved(tree_only):
    problem = Problem(hamiltonian("indefinite", 16, 2), [con.count(16, 7)])
    lean = solve(problem, "exact", k=20, memory_mb=0.0)
    rich = solve(problem, "exact", k=20)
    np.testing.assert_array_equal(lean.states, rich.states)
    assert lean.proven


def test_bad_options_are_refused():
    problem = Problem(hamiltonian("psd", 4, 0), [con.count(4, 2)])
    with pytest.raises(InputError, match="threads"):
        solve(problem, "exact", threads=-1)
    with pytest.raises(InputError, match="time limit"):
        solve(problem, "exact", seconds=0.0)
