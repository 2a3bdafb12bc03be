"""Energies, constraints, problems and spectra: algebra without a model."""

import re
from dataclasses import replace

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from isingcut.files.runs import BlockList
from isingcut.ising import constraints as con
from isingcut.ising.problem import Problem
from isingcut.ising.solvers import solve
from isingcut.ising.spectrum import Spectrum
from isingcut.runs.solving import removal_rows
from shared import InfeasibleError, RunConfig, parametrize, refuses
from tiny import Hamiltonian, states_of


def hamiltonian(n, seed=0, **rest):
    rng = np.random.default_rng(seed)
    J = np.triu(rng.normal(size=(n, n)), 1)
    return Hamiltonian(rng.normal(size=n), J + J.T, float(rng.normal()), **rest)


def all_states(n):
    return (np.arange(2**n)[:, None] >> np.arange(n)) & 1


def test_feasible_and_violations():
    problem = Problem(hamiltonian(4), [con.count(4, 2), *con.keep(4, [0])])
    assert_array_equal(problem.feasible([[0, 1, 1, 0], [1, 1, 0, 0]]), [True, False])
    assert problem.violations([0, 1, 1, 0]) == []
    broken = problem.violations([1, 1, 1, 0])
    assert [text.split(" (")[0] for text in broken] == ["count", "keep 0"]


def test_constraints_are_rows_of_the_hamiltonians_length():
    for rows, words in (
        ([con.count(5, 2)], "is for 5 blocks"),
        ([con.keep(4, [0])], "unpack a"),
    ):
        with refuses(words):
            Problem(hamiltonian(4), rows)


def test_conflicting_constraints_are_named_and_no_others():
    rows = [
        con.count(6, 2),
        con.budget("params", np.ones(6), share=0.5),
        *con.keep(6, [0]),
        con.keep_at_least(["attention"] * 6, "attention"),
    ]
    with refuses("count.*budget params", InfeasibleError) as caught:
        Problem(hamiltonian(6), rows).check()
    assert not re.search("keep 0|attention", str(caught.value))


def test_conflicting_constraints_of_one_reason_are_named_together():
    each = [("a", "why"), ("b", "why"), ("c", "")]
    rows = [
        con.LinearConstraint(x, np.eye(3)[i], "==", 1, y)
        for i, (x, y) in enumerate(each)
    ]
    with refuses(r"removed\); a, b \(why\); c; relax", InfeasibleError):
        Problem(hamiltonian(3), [con.count(3, 2), *rows]).check()


def test_budgets_in_bytes_conflict_too():
    costs = np.full(6, 3e9)
    pair = con.count(6, 2)
    for rows, words in (
        ([pair, con.budget("bytes", costs, amount=7e9)], "budget bytes"),
        ([con.LinearConstraint("half a block", costs, "==", 7.5e9)], "half a block"),
    ):
        with refuses(words, InfeasibleError):
            Problem(hamiltonian(6), rows).check()
    Problem(hamiltonian(6), [pair, con.budget("bytes", costs, amount=6e9)]).check()


def test_a_state_is_feasible():
    rows = [
        con.count(8, 3),
        con.budget("b", np.arange(8.0), amount=17),
        *con.keep(8, [5]),
    ]
    problem = Problem(hamiltonian(8), rows)
    assert problem.violations(problem.a_state()) == []


def test_cardinality():
    costs = np.array([1.0, 2.0, 3.0, 4.0])
    problem = Problem(
        hamiltonian(4), [con.budget("b", costs, amount=5), *con.keep(4, [0])]
    )
    assert problem.cardinality == (2, 3)
    assert Problem(hamiltonian(4)).cardinality == (0, 4)


def test_a_cqm_has_the_energies_and_the_rows():
    rows = [
        con.count(5, 2),
        con.budget("b", np.arange(5.0), amount=3),
        *con.keep(5, [1]),
    ]
    problem = Problem(hamiltonian(5), rows)
    cqm = problem.to_cqm()
    for x, feasible in zip(all_states(5), problem.feasible(all_states(5)), strict=True):
        sample = dict(enumerate(x))
        assert cqm.objective.energy(sample) == pytest.approx(
            problem.hamiltonian.energy(x)
        )
        assert cqm.check_feasible(sample) == feasible


@parametrize("weights", [(1, 2, 3, 4, 2), (2.5, 0.5, 2.6, 3.5, 2.3)])
@parametrize("rhs", [4.0, 4.9, 5.5])
@parametrize("sense", ["<=", ">="])
def test_the_minimum_of_the_penalty_form_is_the_lowest_feasible_state(
    sense, rhs, weights
):
    import dimod

    class Lowest(dimod.ExactSolver):
        def sample(self, bqm):
            return super().sample(bqm).truncate(1)

    row = con.LinearConstraint("w", np.array(weights), sense, rhs)
    problem = Problem(hamiltonian(5), [con.count(5, 2), row])
    found = solve(problem, "dimod", sampler=Lowest)
    assert found.info["penalty"] > 0
    assert found.info["repaired"] == 0
    x = all_states(5)
    x = x[problem.feasible(x)]
    lowest = problem.hamiltonian.energies(x).min()
    assert found.energies[0] == pytest.approx(lowest, abs=1e-9)


def test_energy_is_the_written_formula():
    ham = hamiltonian(6)
    for x in all_states(6):
        ones = np.flatnonzero(x)
        wanted = ham.c + sum(ham.h[i] for i in ones)
        wanted += sum(ham.J[i, j] for i in ones for j in ones if i < j)
        assert ham.energy(x) == pytest.approx(wanted, abs=1e-12)


def test_from_quadratic_is_the_form():
    Q = np.random.default_rng(1).normal(size=(5, 5))
    x = all_states(5)
    ham = Hamiltonian.from_quadratic(Q, c=0.5)
    assert_allclose(ham.energies(x), 0.5 + np.einsum("si,ij,sj->s", x, Q, x))


def test_save_and_load(tmp_path):
    ham = hamiltonian(
        5, unit="nats/token", meta={"model": "tiny", "seed": 3}, h_error=np.ones(5)
    )
    back = Hamiltonian.load(ham.save(tmp_path / "hamiltonian.safetensors"))
    assert_array_equal(back.h, ham.h)
    assert_array_equal(back.J, ham.J)
    assert_array_equal(back.h_error, np.ones(5))
    assert back.J_error is None
    assert (back.c, back.unit, back.meta) == (ham.c, ham.unit, ham.meta)
    assert [p.name for p in tmp_path.iterdir()] == ["hamiltonian.safetensors"]


@parametrize(
    "h, J, message",
    [
        ([0.0, np.nan], np.zeros((2, 2)), "h must be finite"),
        ([0.0, 1.0], [[0.0, 1.0], [2.0, 0.0]], "J must be symmetric"),
        ([0.0, 1.0], [[1.0, 1.0], [1.0, 0.0]], "zero diagonal"),
        ([0.0, 1.0], np.zeros((3, 3)), r"J must have shape \(2, 2\)"),
        ([[0.0, 1.0]], np.zeros((1, 1)), r"h must be a vector .*, got shape \(1, 2\)"),
        ([], np.zeros((0, 0)), "at least one entry"),
        ([[1.0], [1.0, 2.0]], np.zeros((2, 2)), "h must be an array of real numbers"),
        (
            [1e308, 1e308],
            np.zeros((2, 2)),
            r"at most 1e\+100 in size; entry \[0\] is 1e\+308",
        ),
        ([0.0, 1.0], [[0.0, 1e308], [1e308, 0.0]], "J must be finite and at most"),
        (
            np.array([1.0 + 1.0j, 2.0]),
            np.zeros((2, 2)),
            "real numbers: it has complex numbers",
        ),
    ],
)
def test_bad_coefficients_are_refused(h, J, message):
    with refuses(message):
        Hamiltonian(h, J)
    with refuses("a quadratic form must be an array of real numbers"):
        Hamiltonian.from_quadratic([[1.0], [1.0, 2.0]])


@parametrize("states", [[[0, 1]], [0, 1, 0], [[0, 2, 0]]])
def test_bad_states_are_refused(states):
    with refuses("states must"):
        hamiltonian(3).energies(states)


def test_arrays_cannot_be_changed_behind_its_back():
    ham = hamiltonian(3)
    with pytest.raises(ValueError):
        ham.J[0, 1] = 3.0


KINDS = ["attention", "mlp", "attention", "moe", "mlp"]


def obeyed(rows, bits):
    state = np.array([[int(bit) for bit in bits]])
    return all(row.satisfied(state)[0] for row in rows)


def test_count():
    assert obeyed([con.count(4, 2)], "1010")
    assert not obeyed([con.count(4, 2)], "1110")
    with refuses("cannot remove 5 of 4"):
        con.count(4, 5)


def test_kind_counts_keep_unnamed_kinds():
    rows = con.kind_counts(KINDS, {"attention": 1, "mlp": 2})
    assert obeyed(rows, "11001")
    assert not obeyed(rows, "11011")
    with refuses(r"no block is of kind 'mamba'; this model has attention"):
        con.kind_counts(KINDS, {"mamba": 1})
    with refuses("cannot remove 2 moe blocks of 1"):
        con.kind_counts(KINDS, {"moe": 2})


def test_keep_and_drop():
    assert obeyed(con.keep(3, [0]) + con.drop(3, [2]), "011")
    assert not obeyed(con.keep(3, [0]), "111")
    assert not obeyed(con.drop(3, [2]), "110")
    with refuses("cannot keep block 3"):
        con.keep(3, [3])
    assert con.drop(3, np.array([2]))[0].name == "drop 2"


@parametrize("wrong", [1.5, True, "1", None])
def test_blocks_and_their_numbers_are_whole_numbers(wrong):
    for words, make, *given in (
        ("a block to keep must be a whole number, got", con.keep, 4, [wrong]),
        ("a block to drop must be a whole number, got", con.drop, 4, [0, wrong]),
        ("the number of removed blocks must be a whole", con.count, 4, wrong),
        ("the number of mlp blocks must be", con.kind_counts, KINDS, {"mlp": wrong}),
    ):
        with refuses(words):
            make(*given)


def test_budget_by_share_and_amount():
    costs = [10.0, 20.0, 30.0, 40.0]
    share = con.budget("params", costs, share=0.3)
    assert obeyed([share], "0010")
    assert obeyed([share], "1100")
    assert not obeyed([share], "0100")
    assert not obeyed([con.budget("params", costs, share=0.3, total=200.0)], "0010")
    assert obeyed([con.budget("params", costs, amount=40)], "0001")
    with refuses("either a share or an amount"):
        con.budget("params", costs)
    with refuses("from 0% to 100%"):
        con.budget("params", costs, share=1.5)


def test_exact_byte_budgets_survive_rounding():
    assert obeyed([con.budget("bytes", np.full(7, 1e9 / 3), share=3 / 7)], "1110000")


def test_legality_rows():
    assert obeyed([con.keep_at_least(KINDS, "attention")], "11011")
    assert not obeyed([con.keep_at_least(KINDS, "attention")], "10100")
    rows = con.together(5, [(0, 1), (2, 3, 4)], "period")
    assert obeyed(rows, "11000")
    assert not obeyed(rows, "00110")


def test_a_row_needs_finite_coefficients_and_a_known_sense():
    wrong = [
        ([np.nan], "==", 0, "finite"),
        ([0], "==", np.inf, "finite"),
        ([0], "<", 0, "sense"),
    ]
    for row, sense, rhs, words in wrong:
        with refuses(words):
            con.LinearConstraint("bad", row, sense, rhs)


@pytest.fixture
def problem():
    return Problem(hamiltonian(6), [con.count(6, 2)])


def states(*removed):
    return states_of(6, removed)


def test_sorted_distinct_and_recomputed(problem):
    x = states((0, 1), (2, 3), (0, 1), (4, 5), (1, 2))
    spectrum = Spectrum.from_states(problem, x, 3)
    assert len(spectrum) == 3
    assert (np.diff(spectrum.energies) >= 0).all()
    assert_array_equal(spectrum.energies, problem.hamiltonian.energies(spectrum.states))
    assert spectrum.gaps[0] == 0
    assert len({s.tobytes() for s in spectrum.states}) == 3


def test_infeasible_states_are_refused(problem):
    with refuses("violates: count"):
        Spectrum.from_states(problem, states((0, 1, 2)), solver="mine")


def test_ties_are_ordered_by_bits_whatever_the_input_order():
    flat = Problem(Hamiltonian(np.zeros(6), np.zeros((6, 6))), [con.count(6, 2)])
    x = states((0, 1), (2, 3), (4, 5))
    a = Spectrum.from_states(flat, x)
    assert_array_equal(a.states, Spectrum.from_states(flat, x[::-1]).states)
    assert a.removed(0) == [4, 5]


@parametrize(
    "proven, bound, energy, gap",
    [
        (True, None, 2.0, 0),
        (False, None, 2.0, None),
        (False, 1.5, 2.0, pytest.approx(0.25)),
        (False, -1.0, 0.0, float("inf")),
    ],
)
def test_gap(proven, bound, energy, gap):
    found = Spectrum(states((0, 1)), np.array([energy]), proven, bound, "", 0.0)
    assert found.relative_gap == gap


def test_a_spectrum_is_saved_and_loaded(problem, tmp_path):
    spectrum = replace(
        Spectrum.from_states(problem, states((0, 1), (2, 3))),
        proven=True,
        lower_bound=-1.0,
        solver="exact",
        seconds=0.5,
        info={"nodes": 7},
    )
    back = Spectrum.load(spectrum.save(tmp_path / "spectrum.json"))
    assert_array_equal(back.states, spectrum.states)
    assert_array_equal(back.energies, spectrum.energies)
    assert back.to_dict() == spectrum.to_dict()
    assert [p.name for p in tmp_path.iterdir()] == ["spectrum.json"]


def test_the_largest_possible_budget_is_named():
    each = {"kind": "mlp", "parameters": 100_000, "bytes": 1}
    blocks = BlockList(
        path="",
        blocks=[{"index": i, **each} for i in range(4)],
        total_parameters=500_000,
        total_bytes=9,
        legality=[],
    )
    for budget, most in (("params=99%", "params=60%"), ("params=490k", "params=0.3M")):
        with refuses(f"the largest possible is {most}$", InfeasibleError):
            removal_rows(blocks, RunConfig(model="m", budget=budget))
