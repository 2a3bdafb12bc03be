"""Compare all solvers: time to the best state, and time to the proof.

    python benchmarks/solvers.py [--only 32x16 80x40]

Our exact solver proves the K best states (100 by default); its rivals search for the ground state
only. Times exclude compilation. Every size NxM has several families (see instances.py). The figures
of a size are those of its worst family; figures of one family have its name.

proof_seconds_*        exact: time to prove the K best states (or gap_percent_* at the time limit)
tabu_hits_*            seeds of 100 for which a default tabu search found the best known state
tabu_seconds_*         mean time of one such search, to its end
tabu_found_*           seconds until short tabu searches (3 restarts, new seeds) found that state
best_rival_seconds_*   fastest rival's time to prove the ground state; inf if none did in its limit
best_rival_found_*     fastest rival's time to find the best known state; inf if none did
"""

from __future__ import annotations

import argparse
import math
import time

import numpy as np

from instances import SIZES, Instance, generated
from isingcut.ising.constraints import count
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.problem import Problem
from isingcut.ising.solvers import exact, make, solve
from rivals import RIVALS, until


def warm_up() -> None:
    """Compile (or load from the cache) every kernel."""
    rng = np.random.default_rng(0)
    problem = Problem(
        Hamiltonian.from_quadratic(rng.normal(size=(24, 24))), [count(24, 10)]
    )
    budgets = exact.ROOT_BUDGET, exact.NODE_BUDGET
    exact.ROOT_BUDGET = exact.NODE_BUDGET = 100
    solve(problem, "exact", k=5)
    exact.ROOT_BUDGET, exact.NODE_BUDGET = budgets
    solve(problem, "tabu", k=5)


def text(seconds: float | None) -> str:
    """Format seconds for the table."""
    return "-" if seconds is None or math.isinf(seconds) else f"{seconds:.3g}"


def run(instance: Instance, args: argparse.Namespace) -> dict[str, float]:
    """Print the rows of one instance; return its figures."""
    problem = instance.problem
    figures = {}
    label = f"{instance.size:7} {instance.family:18}"
    spectrum = solve(problem, "exact", k=args.k, seconds=args.seconds)
    if spectrum.proven:
        figures["proof_seconds"] = spectrum.seconds
        status = f"{len(spectrum)} states proven"
    else:
        figures["gap_percent"] = 100 * (spectrum.relative_gap or 0.0)
        status = f"gap {figures['gap_percent']:.3f}% to the ground state at the limit"
    best = float(spectrum.energies[0])
    seconds = []
    energies = []
    for seed in range(args.tabu_seeds):
        began = time.perf_counter()
        states = make("tabu", seed=seed).solve(problem, 20).states
        seconds.append(time.perf_counter() - began)
        energies.append(float(problem.hamiltonian.energies(states).min()))
    best = min(best, *energies)
    tolerance = 1e-9 * problem.hamiltonian.scale
    hits = sum(e <= best + tolerance for e in energies)
    figures["tabu_hits"] = hits * 100 / args.tabu_seeds
    figures["tabu_seconds"] = float(np.mean(seconds))
    found = spectrum.energies[0] <= best + tolerance
    nodes = (
        f"{spectrum.info['nodes']} nodes, {spectrum.info['enumerated']:,} enumerated"
    )
    note = f"{status}; {nodes}; E0 = {best:.6g}" + (
        "" if found else " (tabu found better)"
    )
    print(
        f"{label} exact         {'':9} {text(figures.get('proof_seconds')):>9}  {note}"
    )
    reached = until("tabu", problem, args.seconds, best + tolerance, restarts=3)
    figures["tabu_found"] = math.inf if reached is None else reached
    full = f"{hits} of {args.tabu_seeds} seeds, {text(figures['tabu_seconds'])} s each"
    print(f"{label} tabu          {text(reached):>9} {'-':>9}  {full}", flush=True)
    figures["best_rival_seconds"] = figures["best_rival_found"] = math.inf
    for name, rival in RIVALS.items():
        try:
            reached, proof = rival(problem, args.rival_seconds, best + tolerance)
        except ModuleNotFoundError as error:
            print(f"{label} {name:13} not installed: {error.name}")
            continue
        print(f"{label} {name:13} {text(reached):>9} {text(proof):>9}", flush=True)
        figures["best_rival_seconds"] = min(
            figures["best_rival_seconds"], proof or math.inf
        )
        figures["best_rival_found"] = min(
            figures["best_rival_found"], reached or math.inf
        )
    return figures


def main() -> None:
    """Run the instances and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=SIZES, choices=SIZES, help="sizes")
    parser.add_argument("--k", type=int, default=100, help="states to prove")
    parser.add_argument(
        "--seconds", type=float, default=600.0, help="limit of one exact search"
    )
    parser.add_argument(
        "--rival-seconds", type=float, default=20.0, help="limit of one rival"
    )
    parser.add_argument("--tabu-seeds", type=int, default=100)
    args = parser.parse_args()
    warm_up()
    print(f"{'size':7} {'family':18} solver        {'best (s)':>9} {'proof (s)':>9}")
    figures: dict[str, dict[str, float]] = {}
    for size in args.only:
        for instance in generated(size):
            got = run(instance, args)
            figures[f"{size}_{instance.family.replace('-', '_')}"] = got
            total = figures.setdefault(size, {})
            for name, value in got.items():
                # The worst family: slowest of ours, fewest hits, fastest rival.
                worst = min if name == "tabu_hits" or "rival" in name else max
                total[name] = worst(total.get(name, value), value)
    for size, values in figures.items():
        if "gap_percent" in values:
            values.pop("proof_seconds", None)
        for name, value in values.items():
            print(f"{name}_{size}: {value:.4g}")


if __name__ == "__main__":
    main()
