"""Tests of the rivals of the solver benchmark on a small instance."""

from __future__ import annotations

import pytest

from instances import generate
from isingcut.ising.constraints import count
from isingcut.ising.problem import Problem
from isingcut.ising.solvers import solve
from rivals import RIVALS


@pytest.mark.parametrize("name", RIVALS)
def test_rivals_find_the_ground_state(name: str) -> None:
    problem = Problem(generate(15, "indefinite"), [count(15, 5)])
    ground = solve(problem, "exact").energies[0]
    try:
        best, proof = RIVALS[name](problem, 20.0, ground + 1e-9)
    except ModuleNotFoundError as error:
        pytest.skip(f"{error.name} is not installed")
    assert best is not None
    assert (proof is None) == name.startswith("dwave")
