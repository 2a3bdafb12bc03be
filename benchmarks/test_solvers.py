"""The instances of the solver benchmark that are cut between sublayers, and its rivals on them."""

from __future__ import annotations

import numpy as np
import pytest

from instances import apart, generate, generated, shifted
from isingcut.ising.constraints import count
from isingcut.ising.problem import Problem
from isingcut.ising.solvers import solve
from rivals import RIVALS


def test_aligned_variables_keep_their_energy_and_neighbours_exclude_each_other() -> None:
    instances = generated("159x40")
    assert [i.family for i in instances] == ["psd", "indefinite", "pairwise"]
    for instance in instances:
        ham = instance.problem.hamiltonian
        assert not np.diagonal(ham.J, 1).any()
        assert (ham.h > 0).all()
        state = np.zeros((2, 159), dtype=bool)
        state[0, :80:2] = True
        state[1, :79:2] = state[1, 79] = state[1, 78] = True
        assert instance.problem.feasible(state).tolist() == [True, False]
    aligned = generate(80, "psd")
    ham = instances[0].problem.hamiltonian
    np.testing.assert_array_equal(ham.J[::2, ::2], aligned.J)
    np.testing.assert_allclose(ham.h[::2], aligned.h)


@pytest.mark.parametrize("name", RIVALS)
def test_rivals_keep_neighbours_apart(name: str) -> None:
    problem = Problem(shifted(generate(8, "indefinite"), 0), [count(15, 5), *apart(15)])
    free = Problem(problem.hamiltonian, [count(15, 5)])
    ground = solve(problem, "exhaustive").energies[0]
    assert solve(free, "exhaustive").energies[0] < ground
    try:
        best, proof = RIVALS[name](problem, 20.0, ground + 1e-9)
    except ModuleNotFoundError as error:
        pytest.skip(f"{error.name} is not installed")
    assert best is not None
    assert (proof is None) == name.startswith("dwave")
