"""The estimates of `isingcut plan` against what the same measurements really take.

    python benchmarks/plan.py [--model smollm2] [--length 256]

The plan is made first; then a part of each measurement is really run, a few samples of the pair
states and of the gradients, and its time is scaled to the samples that the plan is for. Memory is
that of a process of its own. Ends with one line `name: value` per figure: estimated over actual.
"""

from __future__ import annotations

import argparse
import time

from gradients import in_process, options, prepare
from isingcut.energies.pairwise import removals
from isingcut.evaluation.speed import resident_peak
from isingcut.measure.curvature import gate_curvature
from isingcut.measure.gradients import gate_gradients
from isingcut.measure.losses import measure
from isingcut.measure.work import Work
from isingcut.options.config import RunConfig
from isingcut.runs.plan import make_plan


def actual(name: str, a: argparse.Namespace) -> tuple[float, int]:
    """Seconds of one measurement for each of a few samples, and this process's peak memory."""
    if name == "empirical-fisher":
        a.samples = a.gradient_samples
    replay, tokens = prepare(a)
    began, work = time.perf_counter(), Work(a.batch_tokens)
    if name == "pairwise":
        measure(replay, tokens, removals(len(replay)), work=work)
    elif name == "empirical-fisher":
        gate_gradients(replay, tokens, work=work)
    else:
        gate_curvature(replay, tokens, name, work=work)
    return (time.perf_counter() - began) / a.samples, resident_peak()


def main() -> None:
    parser = options(__doc__, samples=1)
    parser.add_argument("--gradient-samples", type=int, default=8)
    parser.add_argument("--energies", default="pairwise,empirical-fisher,hessian")
    parser.set_defaults(dtype="float32")
    a = parser.parse_args()
    names = ("model", "calibration", "length", "batch_tokens", "dtype", "attention")
    given = {name: getattr(a, name) for name in names}
    plan = make_plan(RunConfig(remove="6", device="cpu", **given))
    print(f"probe: {plan['probe_seconds']:.1f} s")
    print(f"{'energy':<18}{'estimated, s':>14}{'actual, s':>12}{'ratio':>8}{'memory ratio':>14}")
    figures = {}
    for name in a.energies.split(","):
        each, peak = in_process(actual, name, a)
        estimate = next(e for e in plan["energies"] if e["name"] == name)
        whole = each * estimate["samples"]
        ratio, memory = estimate["seconds"] / whole, estimate["memory"] / peak
        print(f"{name:<18}{estimate['seconds']:>14.1f}{whole:>12.1f}{ratio:>8.2f}{memory:>14.2f}")
        key = name.replace("-", "_")
        figures |= {f"plan_{key}_ratio": ratio, f"plan_{key}_memory_ratio": memory}
    print()
    print(f"plan_probe_seconds: {plan['probe_seconds']:.1f}")
    for name, value in figures.items():
        print(f"{name}: {value:.3f}")


if __name__ == "__main__":
    main()
