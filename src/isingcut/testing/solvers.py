"""Conformance kit for solvers: feasible states, correct energies, true proofs.

`python -m isingcut.testing solvers NAME ...` runs it on solvers by name; a test suite calls
`check_solver(part)` with an instance.
"""

from itertools import product

import numpy as np

from isingcut.errors import (
    InfeasibleError,
    InputError,
    IsingcutError,
    VerificationError,
)
from isingcut.ising import constraints as con
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.problem import Problem
from isingcut.ising.solvers.base import Solution, Solver

N = 11
_KINDS = ["attention", "mlp", "moe"] * 3 + ["attention", "mlp"]


def problems(seed: int = 0) -> dict[str, Problem]:
    """Make small problems of every kind of energy and constraint, by name."""
    rng = np.random.default_rng(seed)
    profile = 10 ** rng.uniform(-0.75, 0.75, size=N)
    gradients = rng.normal(size=(2 * N, N)) * np.sqrt(profile)
    definite = Hamiltonian.from_quadratic(gradients.T @ gradients / (2 * N))
    mixed = Hamiltonian.from_quadratic(rng.normal(size=(N, N)), c=1.5)
    degenerate = Hamiltonian.from_quadratic(rng.integers(-2, 3, size=(N, N)))
    costs = rng.uniform(1e6, 3e6, size=N)
    pairs = np.eye(N) + np.eye(N, k=1)
    apart = [
        con.LinearConstraint(f"apart {i}", pairs[i], "<=", 1) for i in range(N - 1)
    ]
    return {
        "positive semidefinite, count": Problem(definite, [con.count(N, 4)]),
        "indefinite, count": Problem(mixed, [con.count(N, 5)]),
        "degenerate, count": Problem(degenerate, [con.count(N, 5)]),
        "no constraint": Problem(mixed),
        "counts per kind": Problem(
            mixed, con.kind_counts(_KINDS, {"attention": 2, "moe": 1})
        ),
        "budget": Problem(definite, [con.budget("params", costs, share=0.35)]),
        "count and budget": Problem(
            mixed, [con.count(N, 4), con.budget("p", costs, share=0.38)]
        ),
        "keep and drop": Problem(
            mixed, [con.count(N, 5), *con.keep(N, [0, 3]), *con.drop(N, [7])]
        ),
        "legality": Problem(
            mixed, [con.count(N, 8), con.keep_at_least(_KINDS, "attention")]
        ),
        "periods": Problem(mixed, con.together(N, [(0, 1, 2), (3, 4), (8, 9, 10)])),
        "neighbours apart": Problem(mixed, [con.count(N, 4), *apart]),
        "one state": Problem(mixed, [con.count(N, N)]),
    }


def check_solver(part: Solver, k: int = 12) -> dict[str, float]:
    """Check one solver on `problems`.

    A solver passes if its states have the right shape and are feasible, if a claimed proof is
    true (the k lowest energies agree with an enumeration), if its lower bound is valid, and if it
    reports an infeasible problem.

    Returns:
        ``ground_states_found``, ``k_best_found`` and ``proofs`` as shares of the problems.

    Raises:
        VerificationError: the solver fails; the message names the problem and the fault.
    """
    ground = best = proofs = 0
    cases = problems()
    every = np.array([*product([False, True], repeat=N)])
    for name, problem in cases.items():
        solution = part.solve(problem, k)

        def wrong(what: str, name: str = name) -> VerificationError:
            return VerificationError(
                f"solver {type(part).__name__} on {name!r}: {what}"
            )

        if not isinstance(solution, Solution):
            raise wrong(f"solve must return a Solution, got {type(solution).__name__}")
        states = np.asarray(solution.states)
        if states.ndim != 2 or states.shape[1] != N or states.dtype != np.bool_:
            raise wrong(
                f"states must be bool (S, {N}), got {states.dtype} {states.shape}"
            )
        for state in states[~problem.feasible(states)][:1]:
            raise wrong("a state violates " + "; ".join(problem.violations(state)))
        ham = problem.hamiltonian
        tolerance = 1e-9 * ham.scale
        wanted = np.sort(ham.energies(every[problem.feasible(every)]))[:k]
        got = np.sort(ham.energies(np.unique(states, axis=0)))[:k]
        same = got.shape == wanted.shape and np.allclose(got, wanted, 0, tolerance)
        if solution.proven and not same:
            raise wrong(f"claims a proof, but its {k} lowest states are not the lowest")
        if (
            solution.lower_bound is not None
            and solution.lower_bound > wanted[0] + tolerance
        ):
            raise wrong(
                f"its lower bound {solution.lower_bound:.9g} is above the ground-state energy "
                f"{wanted[0]:.9g}"
            )
        ground += bool(got.size) and bool(abs(got[0] - wanted[0]) <= tolerance)
        best += same
        proofs += solution.proven
    clash = Problem(
        cases["no constraint"].hamiltonian, [con.count(N, 1), *con.drop(N, [0, 1])]
    )
    try:
        part.solve(clash, k)
    except InfeasibleError:
        pass
    else:
        raise VerificationError(
            f"solver {type(part).__name__} must raise InfeasibleError where no state is feasible"
        )
    total = len(cases)
    return {
        "ground_states_found": ground / total,
        "k_best_found": best / total,
        "proofs": proofs / total,
    }


def main(words: list[str]) -> int:
    """Check the named solvers, or all that need no further argument; return the exit code.

    It is 1 if a solver failed, 2 if its name or class cannot be used; no further one is checked.
    """
    from isingcut.ising.solvers import registry

    for name in words or [n for n in registry.names() if n != "dimod"]:
        try:
            figures = check_solver(registry.get(name)())
        except IsingcutError as error:
            print(error)
            return 2 if isinstance(error, InputError) else 1
        for figure, value in figures.items():
            print(f"{name.replace('-', '_')}_{figure}: {value:.3f}")
    return 0
