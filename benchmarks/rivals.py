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


def scip(problem: Problem, seconds: float, target: float) -> Times:
    """Run SCIP through pyscipopt on linearised products, plus the count times each variable."""
    from pyscipopt import Eventhdlr, Model, quicksum
    from pyscipopt.scip import PY_SCIP_EVENTTYPE

    ham, n = problem.hamiltonian, problem.n
    model = Model()
    model.hideOutput()
    model.setParam("limits/time", seconds)
    x = [model.addVar(vtype="B") for _ in range(n)]
    y = {}
    for i, j in np.argwhere(np.triu(ham.J, 1)).tolist():
        y[i, j] = v = model.addVar(lb=0, ub=1, vtype="C")
        model.addCons(v <= x[i])
        model.addCons(v <= x[j])
        model.addCons(v >= x[i] + x[j] - 1)
    add_rows(problem, x, y, quicksum, model.addCons)
    model.setObjective(
        quicksum(ham.h[i] * x[i] for i in range(n))
        + quicksum(ham.J[i, j] * v for (i, j), v in y.items())
        + ham.c
    )
    began = time.perf_counter()
    reached: list[float] = []

    class Watch(Eventhdlr):
        def eventinit(self) -> None:
            self.model.catchEvent(PY_SCIP_EVENTTYPE.BESTSOLFOUND, self)

        def eventexit(self) -> None:
            self.model.dropEvent(PY_SCIP_EVENTTYPE.BESTSOLFOUND, self)

        def eventexec(self, event: object) -> None:
            if self.model.getSolObjVal(self.model.getBestSol()) <= target:
                reached.append(time.perf_counter() - began)

    model.includeEventhdlr(Watch(), "watch", "time of the best state")
    model.optimize()
    took = time.perf_counter() - began
    proven = took if model.getStatus() == "optimal" else None
    return (min(reached) if reached else None), proven


def cp_sat(problem: Problem, seconds: float, target: float) -> Times:
    """Run OR-Tools CP-SAT on linearised products, coefficients rounded to 1e-7 of the largest."""
    from ortools.sat.python import cp_model

    ham, n = problem.hamiltonian, problem.n
    scale = 1e7 / max(np.abs(ham.h).max(), np.abs(ham.J).max())
    model = cp_model.CpModel()
    x = [model.new_bool_var("") for _ in range(n)]
    y, weights = {}, [round(v * scale) for v in ham.h]
    for i, j in np.argwhere(np.triu(ham.J, 1)).tolist():
        y[i, j] = v = model.new_bool_var("")
        model.add_implication(v, x[i])
        model.add_implication(v, x[j])
        model.add_bool_or([x[i].negated(), x[j].negated(), v])
        weights.append(round(ham.J[i, j] * scale))
    add_rows(problem, x, y, sum, model.add)
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
    return (reached[0] if reached else None), (took if status == cp_model.OPTIMAL else None)


def add_rows(problem: Problem, x: list[Any], y: dict[Any, Any], total: Any, add: Any) -> None:
    """Add the constraints, and the count times each variable if all products exist."""
    for row in problem.constraints:
        terms = [int(a) * v for a, v in zip(row.coefficients, x, strict=True) if a]
        assert row.sense == "=="
        add(total(terms) == round(row.rhs))
    n, (low, high) = problem.n, problem.cardinality
    if low == high and len(y) == n * (n - 1) // 2:
        for i in range(n):
            others = total(y[min(i, j), max(i, j)] for j in range(n) if j != i)
            add(others == (low - 1) * x[i])


RIVALS: dict[str, Rival] = {
    "dwave tabu": dwave("TabuSampler", 2, timeout=20),
    "dwave anneal": dwave("SimulatedAnnealingSampler", 10, num_sweeps=1000),
    "scip": scip,
    "cp-sat": cp_sat,
}
