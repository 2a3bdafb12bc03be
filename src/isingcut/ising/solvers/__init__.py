"""Solvers, one per file, and `solve`, which finds low-energy feasible states of a `Problem`."""

import time
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from isingcut.errors import InputError
from isingcut.ising.problem import Problem
from isingcut.ising.solvers.base import Solution
from isingcut.ising.solvers.dimod import sampler_class
from isingcut.ising.spectrum import Spectrum
from isingcut.ising.states import read_whole
from isingcut.memory import convert_memory_errors
from isingcut.registry import Registry

MOST_STATES = 100_000
"""Largest number of states in a spectrum; all are held in memory, and saved as text."""


class Solvers(Registry):
    """The registry of solvers; ``dimod:package.Class`` names any dimod sampler."""

    def get(self, name: str) -> Any:
        """Return the solver called ``name``.

        Raises:
            UnknownNameError: no such solver.
        """
        if not imports(name):
            return super().get(name)
        return partial(super().get("dimod"), sampler=name.removeprefix("dimod:"))

    def check(self, name: str) -> None:
        """Check in advance that the solver ``name`` can be used.

        Raises:
            UnknownNameError: no such solver.
            InputError: no such sampler.
        """
        self.get(name)
        kind, _, sampler = name.partition(":")
        if kind == "dimod":
            sampler_class(sampler)


def imports(name: str) -> bool:
    """Whether Python must import a module that the solver's name contains."""
    return str(name).startswith("dimod:")


registry = Solvers(__name__, "solver")


def make(solver: str, **options: Any) -> Any:
    """Create the solver called ``solver`` with these options.

    Raises:
        UnknownNameError: no such solver.
        InputError: no such option.
    """
    part = registry.get(solver)
    try:
        return part(**options)
    except TypeError as error:
        raise InputError(f"solver {solver!r}: {error}") from None


@convert_memory_errors()
def solve(
    problem: Problem, solver: str = "auto", k: int = 20, **options: Any
) -> Spectrum:
    """Find the ``k`` lowest states of ``problem``, ranked.

    Args:
        problem: problem to minimise.
        solver: name from `registry`.
        k: number of states.
        options: options of the solver.

    Raises:
        InfeasibleError: no state satisfies the constraints.
        InputError: unknown solver or option, ``k`` out of range, or the solver failed: it found
            nothing, or did not return a set of states.

    Examples:
        >>> from isingcut import constraints
        >>> energy = isingcut.Hamiltonian.from_quadratic(np.diag([3.0, 1.0, 2.0]))
        >>> problem = isingcut.Problem(energy, [constraints.count(3, 2)])
        >>> isingcut.solve(problem, k=1).removed()
        [1, 2]
    """
    if not 1 <= read_whole(k, "k") <= MOST_STATES:
        raise InputError(f"k must be from 1 to {MOST_STATES:,}, got {k}")
    part = make(solver, **options)
    began = time.perf_counter()
    solution = part.solve(problem, k)
    got = type(solution).__name__
    shape: tuple[int, ...] = ()
    if isinstance(solution, Solution):
        shape = np.shape(solution.states)
        got = f"states of shape {shape}"
    if len(shape) != 2 or shape[1] != problem.n:
        raise InputError(
            f"solver {solver!r} returned {got}; expected a Solution with states (S, {problem.n})"
        )
    spectrum = replace(
        Spectrum.from_states(problem, solution.states, k, solver),
        proven=solution.proven,
        lower_bound=solution.lower_bound,
        seconds=time.perf_counter() - began,
        info=dict(solution.info),
    )
    if not len(spectrum):
        raise InputError(
            f"solver {solver!r} found no state that satisfies the constraints; choose another "
            "--solver"
        )
    return spectrum
