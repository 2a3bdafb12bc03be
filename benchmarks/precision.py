"""Does bfloat16 with float32 sums rank states as float32 does?

    python benchmarks/precision.py [--model smollm2] [--samples 2] [--gradient-samples 16]
                                   [--length 128] [--states 200]

Both energies and the measured losses of the same states on the same tokens, once per precision.
Rank correlations are those of the states of one number of removals, averaged over the numbers.
Ends with one line `name: value` per figure.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from gradients import prepare
from isingcut.energies.empirical_fisher import EmpiricalFisher
from isingcut.energies.pairwise import Pairwise
from isingcut.measure.losses import Measurement, measure
from isingcut.measure.work import Work

REMOVED = (4, 8, 12)


def random_states(n: int, count: int, seed: int) -> np.ndarray:
    """(len(REMOVED), count, n) distinct random states of each number of removals."""
    rng = np.random.default_rng(seed)
    found = []
    for removed in REMOVED:
        chosen: set[tuple[int, ...]] = set()
        while len(chosen) < count:
            chosen.add(tuple(sorted(rng.choice(n, removed, replace=False).tolist())))
        states = np.zeros((count, n), dtype=bool)
        for row, blocks in zip(states, sorted(chosen), strict=True):
            row[list(blocks)] = True
        found.append(states)
    return np.array(found)


def of_precision(dtype: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Energies and measured losses in one precision."""
    own = argparse.Namespace(**vars(arguments))
    own.dtype, own.samples = dtype, max(arguments.samples, arguments.gradient_samples)
    replay, tokens = prepare(own)
    few = tokens.select(range(arguments.samples))
    work = Work(arguments.batch_tokens)
    states = random_states(len(replay), arguments.measured, seed=1)
    return {
        "pairwise": Pairwise().measure(replay, few, work),
        "empirical-fisher": EmpiricalFisher().measure(
            replay, tokens.select(range(arguments.gradient_samples)), work
        ),
        "losses": [measure(replay, few, s, batch_tokens=work.batch_tokens) for s in states],
        "n": len(replay),
    }


def ranks(a: Callable[[int], np.ndarray], b: Callable[[int], np.ndarray]) -> list[float]:
    """Spearman correlation of two figures of the states, for each number of removals."""
    return [float(spearmanr(a(k), b(k)).statistic) for k in range(len(REMOVED))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--calibration", default="wiki")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--gradient-samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--states", type=int, default=200, help="ranked by energy, each M")
    parser.add_argument("--measured", type=int, default=20, help="really removed, each M")
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--attention", default="auto", help="auto, sdpa, eager or causal")
    arguments = parser.parse_args()

    low, high = (of_precision(dtype, arguments) for dtype in ("bfloat16", "float32"))
    states = random_states(low["n"], arguments.states, seed=0)
    print(
        f"{arguments.model}, {low['n']} blocks, {torch.get_num_threads()} threads; pairs and "
        f"losses on {arguments.samples} x {arguments.length} tokens, gradients on "
        f"{arguments.gradient_samples} x {arguments.length}"
    )
    figures = {}
    print(
        f"\n{'Spearman, bfloat16 with float32':<34}" + "".join(f"{f'M = {m}':>10}" for m in REMOVED)
    )
    for name in ("pairwise", "empirical-fisher"):
        found = ranks(
            lambda k, name=name: low[name].energies(states[k]),
            lambda k, name=name: high[name].energies(states[k]),
        )
        figures[f"precision_{name.replace('-', '_')}_spearman"] = float(np.mean(found))
        print(f"{name:<34}" + "".join(f"{value:>10.4f}" for value in found))
    for loss in ("kl", "nll"):
        found = ranks(
            lambda k, loss=loss: getattr(low["losses"][k], loss),
            lambda k, loss=loss: getattr(high["losses"][k], loss),
        )
        figures[f"precision_measured_{loss}_spearman"] = float(np.mean(found))
        print(f"{'measured ' + loss:<34}" + "".join(f"{value:>10.4f}" for value in found))

    pairs: list[tuple[Measurement, Measurement]] = list(
        zip(low["losses"], high["losses"], strict=True)
    )
    print(f"\n{'measured KL, nats/token':<34}" + "".join(f"{f'M = {m}':>10}" for m in REMOVED))
    for title, figure in {
        "smallest, float32": lambda a, b: b.kl.min(),
        "mean difference": lambda a, b: (a.kl - b.kl).mean(),
        "largest difference": lambda a, b: np.abs(a.kl - b.kl).max(),
        "largest, relative": lambda a, b: np.abs(a.kl / b.kl - 1).max(),
    }.items():
        print(f"{title:<34}" + "".join(f"{figure(a, b):>10.4f}" for a, b in pairs))
    a, b = low["pairwise"], high["pairwise"]
    off = ~np.eye(low["n"], dtype=bool)
    print(
        f"\npairwise: h differ by {np.abs(a.h - b.h).max():.1e} at most (largest "
        f"{np.abs(b.h).max():.2f}), J by {np.abs(a.J - b.J)[off].max():.1e} (typical size "
        f"{np.median(np.abs(b.J[off])):.1e}), nats/token"
    )
    worst = max(np.abs(a.kl / b.kl - 1).max() for a, b in pairs)
    print()
    for name, value in figures.items():
        print(f"{name}: {value:.4f}")
    print(f"precision_kl_relative_difference: {worst:.4f}")


if __name__ == "__main__":
    main()
