import numpy as np
import pytest

from isingcut.errors import InputError
from isingcut.ising.constraints import count
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.problem import Problem
from isingcut.ising.spectrum import Spectrum


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    return Problem(Hamiltonian.from_quadratic(rng.normal(size=(6, 6))), [count(6, 2)])


def states(*removed):
    x = np.zeros((len(removed), 6), dtype=bool)
    for row, blocks in zip(x, removed, strict=True):
        row[list(blocks)] = True
    return x


def test_sorted_distinct_and_recomputed(problem):
    x = states((0, 1), (2, 3), (0, 1), (4, 5), (1, 2))
    spectrum = Spectrum.from_states(problem, x, 3)
    assert len(spectrum) == 3
    assert (np.diff(spectrum.energies) >= 0).all()
    np.testing.assert_array_equal(spectrum.energies, problem.hamiltonian.energies(spectrum.states))
    assert spectrum.gaps[0] == 0
    assert len({s.tobytes() for s in spectrum.states}) == 3


def test_infeasible_states_are_refused(problem):
    with pytest.raises(InputError, match="violates: count"):
        Spectrum.from_states(problem, states((0, 1, 2)), solver="mine")


def test_ties_are_ordered_by_bits_whatever_the_input_order():
    flat = Problem(Hamiltonian(np.zeros(6), np.zeros((6, 6))), [count(6, 2)])
    x = states((0, 1), (2, 3), (4, 5))
    a = Spectrum.from_states(flat, x)
    b = Spectrum.from_states(flat, x[::-1])
    np.testing.assert_array_equal(a.states, b.states)
    assert a.removed(0) == [4, 5]


def test_diverse_keeps_the_distance(problem):
    x = states((0, 1), (0, 2), (2, 3))
    spectrum = Spectrum(x, np.array([1.0, 2.0, 3.0]), False, None, "", 0.0)
    assert spectrum.diverse(1) == [0, 1, 2]
    assert spectrum.diverse(2) == [0, 2]


def test_gap(problem):
    x = states((0, 1))

    def gap(proven, bound, energy=2.0):
        return Spectrum(x, np.array([energy]), proven, bound, "", 0.0).relative_gap

    assert gap(True, None) == 0
    assert gap(False, None) is None
    assert gap(False, 1.5) == pytest.approx(0.25)
    assert gap(False, -1.0, 0.0) == float("inf")


def test_save_and_load(problem, tmp_path):
    spectrum = Spectrum.from_states(
        problem,
        states((0, 1), (2, 3)),
        proven=True,
        lower_bound=-1.0,
        solver="exact",
        seconds=0.5,
        info={"nodes": 7},
    )
    back = Spectrum.load(spectrum.save(tmp_path / "spectrum.json"))
    np.testing.assert_array_equal(back.states, spectrum.states)
    np.testing.assert_array_equal(back.energies, spectrum.energies)
    assert back.to_dict() == spectrum.to_dict()
    assert [p.name for p in tmp_path.iterdir()] == ["spectrum.json"]
