"""The estimates of `isingcut plan` against what the same measurements really take.

    python benchmarks/plan.py [--model smollm2] [--length 256]

The plan is made first; then a part of each measurement is really run, a few samples of the pair
states and of the gradients, and its time is scaled to the samples that the plan is for. Memory is
that of a process of its own. Ends with one line `name: value` per figure: estimated over actual.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from typing import Any

from isingcut.data.calibration import build
from isingcut.energies.pairwise import removals
from isingcut.evaluation.speed import resident_peak
from isingcut.measure.curvature import gate_curvature
from isingcut.measure.gradients import gate_gradients
from isingcut.measure.losses import measure
from isingcut.measure.work import Work
from isingcut.models import load as models
from isingcut.models.architectures.blocks import find_stack, stack_modules
from isingcut.models.replay import Replay
from isingcut.models.sources import resolve
from isingcut.options.config import RunConfig
from isingcut.runs.plan import make_plan


def actual(name: str, a: argparse.Namespace, answer: Any = None) -> tuple[float, int]:
    """Seconds of one measurement on a few samples, and the peak memory of this process."""
    loaded = models.load(resolve(a.model), dtype="float32", device="cpu")
    replay = Replay(loaded.model, stack_modules(loaded.model, find_stack(loaded.model)))
    samples = a.gradient_samples if name == "empirical-fisher" else a.samples
    tokens = build(
        a.calibration,
        loaded.tokenizer,
        samples=samples,
        rank_samples=2,
        report_samples=2,
        length=a.length,
        seed=0,
    ).splits["energy"]
    began = time.perf_counter()
    if name == "pairwise":
        measure(replay, tokens, removals(len(replay)), work=Work(a.batch_tokens))
    elif name == "empirical-fisher":
        gate_gradients(replay, tokens, work=Work(a.batch_tokens))
    else:
        gate_curvature(replay, tokens, name, work=Work(a.batch_tokens))
    found = (time.perf_counter() - began) / samples, resident_peak()
    if answer is not None:
        answer.put(found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--calibration", default="wiki")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=1, help="of states and of curvature")
    parser.add_argument("--gradient-samples", type=int, default=8)
    parser.add_argument("--energies", default="pairwise,empirical-fisher,hessian")
    a = parser.parse_args()
    config = RunConfig(
        model=a.model,
        remove="6",
        length=a.length,
        batch_tokens=a.batch_tokens,
        dtype="float32",
        device="cpu",
    )
    plan = make_plan(config)
    print(f"probe: {plan['probe_seconds']:.1f} s")
    print(f"{'energy':<18}{'estimated, s':>14}{'actual, s':>12}{'ratio':>8}{'memory ratio':>14}")
    context = multiprocessing.get_context("spawn")
    figures = {}
    for name in a.energies.split(","):
        answer = context.Queue()
        process = context.Process(target=actual, args=(name, a, answer))
        process.start()
        each, peak = answer.get()
        process.join()
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
