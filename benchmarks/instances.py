"""Instances of the solver benchmark, of a published recipe.

Recipe, for N blocks: own terms d_i = 0.02 x 10^(p_i), where p is the profile
1.5 (2 t - 1)^2 over the depth t in [0, 1] plus normal noise of 0.15, rescaled to exactly
[0, 1.5]. The terms span a decade and a half and are largest at both ends, as in measured
models. Blocks are correlated as C_ij = 0.8^|i-j|.

- ``psd``: the Gram matrix of 4 N samples from N(0, C), scaled to the own terms.
- ``indefinite``: sqrt(d_i d_j) (0.3 C_ij + 0.15 w_ij) with symmetric standard normal w.
- ``kinds``: ``indefinite`` with the block kinds mamba, mlp, attention in the order of a hybrid
  model (every 13th block attention, the others alternating); counts per kind are exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from isingcut.ising.constraints import count, kind_counts
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.problem import Problem

SIZES = ["32x16", "40x12", "52x13", "80x8", "80x16", "80x24", "80x40", "126x63"]


@dataclass(frozen=True)
class Instance:
    """One row of the benchmark; ``size`` is NxM and groups the families."""

    size: str
    family: str
    problem: Problem


def generate(n: int, family: str) -> Hamiltonian:
    """Return the Hamiltonian of the recipe above."""
    rng = np.random.default_rng([0, n, {"psd": 0, "indefinite": 1}[family]])
    t = np.linspace(0, 1, n)
    profile = 1.5 * np.abs(2 * t - 1) ** 2 + rng.normal(scale=0.15, size=n)
    profile = 1.5 * (profile - profile.min()) / (profile.max() - profile.min())
    d = 0.02 * 10**profile
    C = 0.8 ** np.abs(np.subtract.outer(np.arange(n), np.arange(n)))
    if family == "psd":
        samples = rng.multivariate_normal(np.zeros(n), C, size=4 * n)
        Q = samples.T @ samples / (4 * n)
        Q *= np.sqrt(np.outer(d, d)) / np.sqrt(np.outer(np.diag(Q), np.diag(Q)))
    else:
        W = rng.normal(size=(n, n))
        W = (W + W.T) / np.sqrt(2)
        Q = (0.3 * C + 0.15 * W) * np.sqrt(np.outer(d, d))
        np.fill_diagonal(Q, d)
    return Hamiltonian.from_quadratic(Q, meta={"family": family})


def generated(size: str) -> list[Instance]:
    """Return the instances of a size ``NxM``, one per family; N = 52 is the three-kind hybrid."""
    n, m = (int(v) for v in size.split("x"))
    if n == 52:
        kinds = [
            "attention" if i % 13 == 6 else ("mamba", "mlp")[i % 2] for i in range(n)
        ]
        mlp = (m - 1) // 2
        rows = kind_counts(kinds, {"attention": 1, "mlp": mlp, "mamba": m - 1 - mlp})
        return [Instance(size, "kinds", Problem(generate(n, "indefinite"), rows))]
    return [
        Instance(size, family, Problem(generate(n, family), [count(n, m)]))
        for family in ("psd", "indefinite")
    ]
