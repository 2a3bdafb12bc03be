"""Rival solvers of the solver benchmark, which search for the ground state only.

A rival is a function (problem, seconds, target) -> (time to the best state or None, time to proof
or None). Heuristics are called with new seeds until they reach the target, exact solvers once.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from isingcut.ising.problem import Problem
from isingcut.ising.solvers import make

Times = tuple[float | None, float | None]
Rival = Callable[[Problem, float, float], Times]

PENALTIES = (1.0, 0.3, 0.1, 0.03)


def until(
    name: str, problem: Problem, seconds: float, target: float, **options: Any
) -> float | None:
    """Return the seconds until new seeds of a heuristic reach the target; None past the limit."""
    began = time.perf_counter()
    seed = 0
    while time.perf_counter() - began < seconds:
        if name == "dimod":
            options["penalty"] = PENALTIES[seed % len(PENALTIES)]
        states = make(name, seed=seed, **options).solve(problem, 1).states
        if len(states) and problem.hamiltonian.energies(states).min() <= target:
            return time.perf_counter() - began
        seed += 1
    return None


def dwave(sampler: str, reads: int, **options: int) -> Rival:
    """Return the rival of a dwave-samplers sampler: the penalty form, four penalties in turn."""

    def rival(problem: Problem, seconds: float, target: float) -> Times:
        found = getattr(importlib.import_module("dwave.samplers"), sampler)
        asked = {"sampler": found, "reads": reads, "options": options}
        return until("dimod", problem, seconds, target, **asked), None

    return rival


def cp_sat(problem: Problem, seconds: float, target: float) -> Times:
    """Run OR-Tools CP-SAT on linearised products, coefficients rounded to 1e-7 of the largest."""
    from ortools.sat.python import cp_model

    ham = problem.hamiltonian
    n = problem.n
    scale = 1e7 / max(np.abs(ham.h).max(), np.abs(ham.J).max())
    model = cp_model.CpModel()
    x = [model.new_bool_var("") for _ in range(n)]
    y = {}
    weights = [round(v * scale) for v in ham.h]
    for i, j in np.argwhere(np.triu(ham.J, 1)).tolist():
        y[i, j] = v = model.new_bool_var("")
        model.add_implication(v, x[i])
        model.add_implication(v, x[j])
        model.add_bool_or([x[i].negated(), x[j].negated(), v])
        weights.append(round(ham.J[i, j] * scale))
    for row in problem.constraints:
        assert row.sense == "=="
        terms = [int(a) * v for a, v in zip(row.coefficients, x, strict=True) if a]
        model.add(sum(terms) == round(row.rhs))
    low, high = problem.cardinality
    # If all products exist, add the count times each variable.
    if low == high and len(y) == n * (n - 1) // 2:
        for i in range(n):
            others = sum(y[min(i, j), max(i, j)] for j in range(n) if j != i)
            model.add(others == (low - 1) * x[i])
    model.minimize(cp_model.LinearExpr.weighted_sum([*x, *y.values()], weights))
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = seconds
    solver.parameters.num_workers = 2
    began = time.perf_counter()
    reached: list[float] = []

    class Watch(cp_model.CpSolverSolutionCallback):
        def on_solution_callback(self) -> None:
            state = np.array([[self.value(v) for v in x]])
            if not reached and ham.energies(state)[0] <= target + 1e-5 * abs(target):
                reached.append(time.perf_counter() - began)

    status = solver.solve(model, Watch())
    took = time.perf_counter() - began
    return (reached[0] if reached else None), (
        took if status == cp_model.OPTIMAL else None
    )


RIVALS: dict[str, Rival] = {
    "dwave tabu": dwave("TabuSampler", 2, timeout=20),
    "dwave anneal": dwave("SimulatedAnnealingSampler", 10, num_sweeps=1000),
    "cp-sat": cp_sat,
}
