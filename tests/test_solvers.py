"""Solvers: states they find, proofs, refusals, and reports of early stops."""

from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import pytest
from dwave.samplers import SimulatedAnnealingSampler, TabuSampler
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from isingcut.ising import constraints as con
from isingcut.ising.problem import Problem
from isingcut.ising.solvers import exact, make, registry, solve, tabu
from isingcut.ising.solvers._relaxation import (
    SIGNS,
    Relaxation,
    Subproblem,
    spin_matrix,
)
from isingcut.ising.solvers.base import Solution, reduce
from isingcut.ising.solvers.dimod import find_nearest
from isingcut.testing.solvers import check_solver
from isingcut.testing.solvers import main as kit
from shared import (
    InfeasibleError,
    InputError,
    UnknownNameError,
    VerificationError,
    parametrize,
    refuses,
)
from test_problem import all_states
from tiny import Hamiltonian


def hamiltonian(kind, n, seed):
    rng = np.random.default_rng(seed)
    if kind == "psd":
        A = rng.normal(size=(n, n)) * 10 ** rng.uniform(-1, 0.5, size=n)
        return Hamiltonian.from_quadratic(A.T @ A / n)
    if kind == "degenerate":
        return Hamiltonian.from_quadratic(rng.integers(-2, 3, size=(n, n)))
    if kind == "flat":
        return Hamiltonian(np.zeros(n), np.zeros((n, n)))
    return Hamiltonian.from_quadratic(rng.normal(size=(n, n)), c=float(rng.normal()))


def counted(kind, n, m, seed=0):
    """Return the problem of removing m of n blocks by an energy of that kind."""
    return Problem(hamiltonian(kind, n, seed), [con.count(n, m)])


def test_unknown_solvers_and_options_are_refused():
    problem = counted("indefinite", 4, 2)
    with refuses("did you mean 'tabu'", UnknownNameError):
        solve(problem, "taboo")
    with refuses("heat"):
        solve(problem, "tabu", heat=3)
    with refuses("'tabu' is already registered") as caught:
        registry.register("tabu", None)
    assert caught.type is InputError


def test_tabu_depends_on_nothing_but_seed_and_options():
    problem = counted("indefinite", 30, 12)
    a = solve(problem, "tabu", restarts=3, steps=50, seed=5)
    b = solve(problem, "tabu", restarts=3, steps=50, seed=5)
    assert_array_equal(a.states, b.states)


WIDE = counted("indefinite", 60, 30)


@parametrize(
    "stopped, options",
    [
        ("time limit", {"seconds": 0.2}),
        ("node limit", {"nodes": 2}),
        ("interrupted", {}),
    ],
)
def test_a_stopped_search_has_the_best_so_far_and_a_bound(
    stopped, options, monkeypatch
):
    calls = iter([KeyboardInterrupt])
    wait = exact.wait

    def interrupt(*arguments):
        for error in calls:
            raise error
        return wait(*arguments)

    if stopped == "interrupted":
        monkeypatch.setattr(exact, "wait", interrupt)
    # Proving the top 20 of this family takes minutes.
    spectrum = solve(WIDE, "exact", **options)
    assert spectrum.info["stopped"] == stopped
    assert not spectrum.proven
    assert len(spectrum) == 20
    assert spectrum.lower_bound < spectrum.energies[0]
    assert spectrum.relative_gap > 0


def test_auto_stops_at_its_limit():
    assert solve(WIDE, "auto", seconds=0.2).info["stopped"] == "time limit"


def test_a_limit_does_not_count_the_compilation(monkeypatch):
    now = [0.0]
    compilation = iter([100.0])
    plain = tabu.tabu_walk

    def walk(*arguments):
        now[0] += next(compilation, 0.0)
        return plain(*arguments)

    monkeypatch.setattr(tabu, "tabu_walk", walk)
    monkeypatch.setattr(
        "isingcut.ising.solvers.exact.time.perf_counter", lambda: now[0]
    )
    exact.compile_search.cache_clear()
    assert solve(counted("indefinite", 12, 5), "auto", k=3, seconds=60.0).proven
    assert now == [100.0]


def test_tabu_stops_at_its_limit():
    assert solve(WIDE, "tabu", restarts=10**6, seconds=0.05).info["restarts"] < 10**6


@parametrize("k", [0, -1, 10**9])
def test_the_number_of_states_is_bounded(k):
    with refuses("k must be from 1 to 100,000"):
        solve(WIDE, "tabu", k=k)


def test_arguments_of_another_type_are_refused_in_words():
    for k in ("3", True, 1.5):
        with refuses(f"k must be a whole number, got {k!r}"):
            solve(WIDE, "tabu", k=k)
    for name in (3, ["tabu"]):
        with refuses("known: auto, dimod, exact, tabu", UnknownNameError):
            solve(WIDE, name)


class Odd:
    """A third-party solver that returns no solution."""

    result = None

    def solve(self, problem, k):
        return self.result


def test_what_is_no_solution_is_refused(monkeypatch):
    monkeypatch.setitem(registry._registered, "odd", Odd)
    for result, message in {
        None: "returned NoneType; expected a Solution",
        Solution(
            np.zeros((2, 3), dtype=bool)
        ): r"shape \(2, 3\); expected .* \(S, 60\)",
        Solution(np.zeros((0, 60), dtype=bool)): "found no state that satisfies",
    }.items():
        monkeypatch.setattr(Odd, "result", result)
        with refuses(message):
            solve(WIDE, "odd")


@parametrize("name", ["exact", "auto"])
def test_solvers_with_a_proof(name):
    assert set(check_solver(make(name)).values()) == {1.0}


def test_tabu():
    figures = check_solver(make("tabu"))
    assert figures["ground_states_found"] == 1.0
    assert figures["k_best_found"] > 0.8


@parametrize(
    "name, options",
    [
        ("dimod", {"sampler": SimulatedAnnealingSampler, "reads": 50}),
        ("dimod", {"sampler": TabuSampler, "reads": 5, "options": {"timeout": 5}}),
    ],
    ids=["annealing", "tabu"],
)
def test_dimod_samplers(name, options):
    figures = check_solver(make(name, **options))
    assert figures["ground_states_found"] > 0.7
    assert figures["proofs"] == 0


def test_a_sampler_by_name_that_takes_constraints():
    problem = counted("indefinite", 6, 3)
    found = solve(problem, "dimod:dimod.ExactCQMSolver", k=5)
    assert_allclose(found.energies, solve(problem, "exact", k=5).energies)
    assert not found.info.get("proven")


class AllOnes:
    """A sampler that ignores the problem."""

    parameters = ()

    def sample(self, bqm):
        import dimod

        return dimod.SampleSet.from_samples_bqm([dict.fromkeys(bqm.variables, 1)], bqm)


@parametrize("sampler", [AllOnes, AllOnes()], ids=["class", "instance"])
def test_infeasible_samples_are_repaired_and_counted(sampler):
    spectrum = solve(counted("indefinite", 8, 3), "dimod", k=5, sampler=sampler)
    assert len(spectrum) == 1
    assert spectrum.info["repaired"] == 1
    assert spectrum.info["ignored"] == ["num_reads", "seed"]
    assert spectrum.states.sum() == 3


def test_an_interrupt_of_a_sampler_is_the_users(fails):
    fails(AllOnes, "sample", KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        make("dimod", sampler=AllOnes()).solve(counted("flat", 3, 1), 1)


def test_a_named_class_gets_its_options(tmp_path, monkeypatch):
    source = """
import dimod
class Low(dimod.Sampler):
    properties, parameters = {}, {"num_reads": [], "seed": [], "heat": []}
    told = None
    def sample(self, bqm, **options):
        Low.told = options
        return dimod.ExactSolver().sample(bqm)
"""
    (tmp_path / "own_samplers.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    problem = counted("indefinite", 8, 3)
    found = solve(
        problem, "dimod:own_samplers.Low", k=5, options={"heat": 2, "cold": 1}
    )
    import own_samplers

    assert own_samplers.Low.told == {"heat": 2, "num_reads": 100, "seed": 0}
    assert found.info["ignored"] == ["cold"]
    assert_array_equal(found.states, solve(problem, "exact", k=5).states)


def test_a_sample_is_repaired_to_the_nearest_feasible_state():
    # Two flips reach a sum of 4. Of the states so near, {0, 3} has the lowest energy.
    row = con.LinearConstraint("sum", np.array([3.0, 3.0, 2.0, 1.0]), "==", 4)
    problem = Problem(Hamiltonian([0, 1, 0, 0], np.zeros((4, 4))), [row])
    found = find_nearest(problem, np.array([True, True, False, False]))
    assert found.tolist() == [True, False, False, True]
    impossible = Problem(problem.hamiltonian, [row, *con.drop(4, [0, 1])])
    with pytest.raises(InfeasibleError):
        find_nearest(impossible, np.zeros(4, dtype=bool))


@dataclass(frozen=True)
class Fake:
    """A solver with one fault."""

    fault: str

    def solve(self, problem, k):
        good = make("exact").solve(problem, k)
        return {
            "type": good.states,
            "shape": Solution(good.states[:, :3]),
            "infeasible": Solution(~good.states),
            "proof": Solution(good.states[1:], None, True),
            "bound": Solution(good.states, good.lower_bound + 1.0),
        }[self.fault]


@parametrize(
    "fault, message",
    [
        ("type", "must return a Solution"),
        ("shape", "must be bool"),
        ("infeasible", "violates"),
        ("proof", "claims a proof"),
        ("bound", "lower bound"),
    ],
)
def test_the_kit_finds_faults(fault, message):
    with refuses(message, VerificationError):
        check_solver(Fake(fault))


def test_the_kit_wants_infeasibility_reported():
    class Silent:
        def solve(self, problem, k):
            with suppress(InfeasibleError):
                return make("exact").solve(problem, k)
            return Solution(np.zeros((0, problem.n), dtype=bool))

    with refuses("must raise InfeasibleError", VerificationError):
        check_solver(Silent())


def test_the_kit_ends_with_one_line_about_a_fault(monkeypatch, capsys):
    monkeypatch.setitem(registry._registered, "fake", lambda: Fake("shape"))
    for name, code, words in (
        ("taboo", 2, "did you mean 'tabu'"),
        ("fake", 1, "must be bool"),
    ):
        assert kit([name]) == code
        assert words in capsys.readouterr().out


@pytest.fixture
def tree_only(monkeypatch):
    """Allow almost no enumeration, so that small problems exercise the semidefinite tree."""
    monkeypatch.setattr(exact, "ROOT_BUDGET", 1)
    monkeypatch.setattr(exact, "NODE_BUDGET", 1)


def brute_force(problem, k):
    x = all_states(problem.n)
    x = x[problem.feasible(x)]
    return np.sort(problem.hamiltonian.energies(x))[:k]


def apart(n):
    pairs = np.eye(n) + np.eye(n, k=1)
    return [con.LinearConstraint(f"apart {k}", pairs[k], "<=", 1) for k in range(n - 1)]


@st.composite
def problems(draw, most):
    n = draw(st.integers(2, most))
    seed = draw(st.integers(0, 10_000))
    kind = draw(st.sampled_from(["psd", "indefinite", "degenerate", "flat"]))
    rng = np.random.default_rng(seed)
    rows = [con.count(n, draw(st.integers(0, n)))] if draw(st.booleans()) else []
    kinds = [str(v) for v in rng.integers(0, 2, size=n)]
    half = {k: kinds.count(k) // 2 for k in set(kinds)}
    cap = rng.integers(-3, 4, size=n)
    extra = {
        "none": [],
        "budget": [con.budget("params", rng.uniform(1e6, 3e6, size=n), share=0.4)],
        "at most": [con.LinearConstraint("cap", cap, "<=", 1.0)],
        "keep": con.keep(n, [0]),
        "together": con.together(n, [(0, n - 1)]),
        "apart": apart(n),
    }
    name = draw(st.sampled_from(["kinds", *extra]))
    rows = con.kind_counts(kinds, half) if name == "kinds" else rows + extra[name]
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
    assert_allclose(spectrum.energies, wanted, atol=tolerance)
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


@parametrize("kind", ["psd", "indefinite", "degenerate"])
@parametrize("nodes", [5, 100_000], ids=["tree", "enumeration"])
def test_nothing_is_pruned_that_the_heuristic_would_have_found(
    monkeypatch, kind, nodes
):
    # The pool starts empty: a state that a wrong bound drops is missing from the answer.
    nothing = lambda self, r, *rest: (np.zeros((0, r.n), dtype=np.uint8), 0)  # noqa: E731
    monkeypatch.setattr(tabu.Tabu, "search", nothing)
    monkeypatch.setattr(exact, "ROOT_BUDGET", nodes)
    monkeypatch.setattr(exact, "NODE_BUDGET", nodes)
    cap = con.LinearConstraint("cap", np.arange(11) % 4, "<=", 7.0)
    for seed, m in enumerate((3, 5, 9)):
        ham = hamiltonian(kind, 11, seed)
        row = con.count(11, m)
        for rows in ([row], [row, cap], [con.count(11, 3), cap, *apart(11)]):
            assert_the_k_best(Problem(ham, rows), 4, threads=1)


def test_bounds_are_bounds():
    n = 12
    m = 5
    ham = hamiltonian("indefinite", n, 4)
    C = spin_matrix(ham.h, ham.J, ham.c)
    x = all_states(n)
    x = x[x.sum(axis=1) == m]
    s = np.column_stack([np.ones(len(x)), 2 * x - 1.0])
    energies = ham.energies(x)
    assert_allclose(np.einsum("si,ij,sj->s", s, C, s), energies, atol=1e-12)
    energies -= ham.c
    lowest = energies.min()
    reduced = reduce(Problem(ham, [con.count(n, m)]))
    relaxation = Relaxation(
        reduced, np.array([lowest + 0.1]), np.zeros(1, dtype=np.int64)
    )
    part = Subproblem(reduced, np.full(n, -1, dtype=np.int8), m)
    bound, splits, dual = relaxation.bound(part, None)
    assert lowest - 0.05 * abs(lowest) < bound <= lowest + 1e-9
    assert np.isfinite(splits).all()
    for i in range(n):
        for value in (0, 1):
            assert splits[value, i] <= energies[x[:, i] == value].min() + 1e-9
    # Multipliers passed to a child still give a bound of the child.
    for i, value in ((0, 0), (5, 1), (11, 1)):
        fixed = np.full(n, -1, dtype=np.int8)
        fixed[i] = value
        child = dual.restrict(fixed)
        W = s[x[:, i] == value]
        a = W[:, np.delete(np.arange(n + 1), i + 1)][:, child.cuts[:, :3]]
        pairs = a[..., [0, 0, 1]] * a[..., [1, 2, 2]]
        assert (1 + (pairs * SIGNS[child.cuts[:, 3]]).sum(axis=-1) >= 0).all()
        # On binaries the diagonal terms are constants: nothing may be lost or gained.
        assert child.x[:n].sum() == pytest.approx(dual.x[: n + 1].sum())
        assert len(child.cuts)


def test_threads_agree(tree_only):
    problem = counted("psd", 20, 8, 3)
    one = solve(problem, "exact", k=30, threads=1)
    assert_array_equal(one.states, solve(problem, "exact", k=30, threads=2).states)
    assert one.info["evaluations"] > 0


def test_open_nodes_without_multipliers_are_still_solved(tree_only, monkeypatch):
    problem = counted("indefinite", 16, 7, 2)
    states = solve(problem, "exact", k=20).states
    monkeypatch.setattr("isingcut.ising.solvers.exact.OPEN_BYTES", 0.0)
    lean = solve(problem, "exact", k=20)
    assert_array_equal(lean.states, states)
    assert lean.proven


@parametrize(
    "words, options",
    [("threads", {"threads": -1}), ("time limit", {"seconds": 0.0})],
)
def test_bad_options_are_refused(words, options):
    with refuses(words):
        solve(WIDE, "exact", **options)
