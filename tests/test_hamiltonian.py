import numpy as np
import pytest

from isingcut.errors import InputError
from isingcut.ising.hamiltonian import Hamiltonian


def random_hamiltonian(n, seed=0, **rest):
    rng = np.random.default_rng(seed)
    J = np.triu(rng.normal(size=(n, n)), 1)
    return Hamiltonian(rng.normal(size=n), J + J.T, float(rng.normal()), **rest)


def all_states(n):
    return (np.arange(2**n)[:, None] >> np.arange(n)) & 1


def test_energy_is_the_written_formula():
    ham = random_hamiltonian(6)
    for x in all_states(6):
        ones = np.flatnonzero(x)
        wanted = ham.c + sum(ham.h[i] for i in ones)
        wanted += sum(ham.J[i, j] for i in ones for j in ones if i < j)
        assert ham.energy(x) == pytest.approx(wanted, abs=1e-12)


def test_from_quadratic_is_the_form():
    rng = np.random.default_rng(1)
    Q = rng.normal(size=(5, 5))
    x = all_states(5)
    ham = Hamiltonian.from_quadratic(Q, c=0.5)
    np.testing.assert_allclose(ham.energies(x), 0.5 + np.einsum("si,ij,sj->s", x, Q, x))


def test_ising_round_trip_and_equal_energies():
    ham = random_hamiltonian(7)
    ising = ham.to_ising()
    x = all_states(7)
    s = 2 * x - 1
    energies = ising.offset + s @ ising.h + 0.5 * np.einsum("si,ij,sj->s", s, ising.J, s)
    np.testing.assert_allclose(energies, ham.energies(x), atol=1e-12)
    back = Hamiltonian.from_ising(*ising)
    for name in ("h", "J", "c"):
        np.testing.assert_allclose(getattr(back, name), getattr(ham, name), atol=1e-12)


def test_bqm_round_trip():
    ham = random_hamiltonian(6)
    bqm = ham.to_bqm()
    x = all_states(6)
    np.testing.assert_allclose(bqm.energies((x, range(6))), ham.energies(x), atol=1e-12)
    back = Hamiltonian.from_bqm(bqm)
    np.testing.assert_allclose(back.J, ham.J, atol=1e-12)
    np.testing.assert_allclose(back.h, ham.h, atol=1e-12)
    spin = Hamiltonian.from_bqm(bqm.change_vartype("SPIN", inplace=False))
    np.testing.assert_allclose(spin.energies(x), ham.energies(x), atol=1e-12)


def test_save_and_load(tmp_path):
    ham = random_hamiltonian(
        5, unit="nats/token", meta={"model": "tiny", "seed": 3}, h_error=np.ones(5)
    )
    path = ham.save(tmp_path / "hamiltonian.safetensors")
    back = Hamiltonian.load(path)
    np.testing.assert_array_equal(back.h, ham.h)
    np.testing.assert_array_equal(back.J, ham.J)
    np.testing.assert_array_equal(back.h_error, np.ones(5))
    assert back.J_error is None
    assert (back.c, back.unit, back.meta) == (ham.c, ham.unit, ham.meta)
    assert [p.name for p in tmp_path.iterdir()] == ["hamiltonian.safetensors"]


@pytest.mark.parametrize(
    ("h", "J", "message"),
    [
        ([0.0, np.nan], np.zeros((2, 2)), "h must be finite"),
        ([0.0, 1.0], [[0.0, np.inf], [np.inf, 0.0]], "J must be finite"),
        ([0.0, 1.0], [[0.0, 1.0], [2.0, 0.0]], "J must be symmetric"),
        ([0.0, 1.0], [[1.0, 1.0], [1.0, 0.0]], "zero diagonal"),
        ([0.0, 1.0], np.zeros((3, 3)), r"J must have shape \(2, 2\)"),
        ([[0.0, 1.0]], np.zeros((1, 1)), r"h must have shape \(1,\)"),
        ([], np.zeros((0, 0)), "at least one entry"),
        (["a", "b"], np.zeros((2, 2)), "array of real numbers"),
    ],
)
def test_bad_coefficients_are_refused(h, J, message):
    with pytest.raises(InputError, match=message):
        Hamiltonian(h, J)


@pytest.mark.parametrize("states", [[[0, 1]], [0, 1, 0], [[0, 2, 0]]])
def test_bad_states_are_refused(states):
    with pytest.raises(InputError, match="states must"):
        random_hamiltonian(3).energies(states)


def test_arrays_cannot_be_changed_behind_its_back():
    ham = random_hamiltonian(3)
    with pytest.raises(ValueError):
        ham.J[0, 1] = 3.0
