"""Instances of the solver benchmark: a published recipe, and measured Hamiltonians.

Recipe, for N blocks and a seed: own terms d_i = 0.02 x 10^(p_i), where p is the profile
1.5 (2 t - 1)^2 over the depth t in [0, 1] plus normal noise of 0.15, stretched to exactly
[0, 1.5]: a decade and a half, the ends costly, as measured models have it. Neighbours are
correlated as C_ij = 0.8^|i-j|.

- ``psd``: the Gram matrix of 4 N samples from N(0, C), scaled to the own terms.
- ``indefinite``: sqrt(d_i d_j) (0.3 C_ij + 0.15 w_ij) with symmetric standard normal w.
- ``kinds``: ``indefinite`` with the block kinds mamba, mlp, attention in the order of a hybrid
  model (every 13th block attention, the others alternating); counts per kind are exact.

N = 159 is a model of 80 blocks cut between sublayers: variable k removes sublayers k and k + 1, so
neighbours exclude each other, and M of them are M blocks' worth. The variables 2 i are the blocks;
their energy is ``psd`` or ``indefinite`` as above, or ``pairwise``: the measured SmolLM2-135M one
stretched from 30 to 80 blocks (own terms times 3/8, couplings and their spread times its square,
which leaves the energy of a removed fraction as it is). Shifted variables get what a search would
begin with and then correct: own terms the geometric mean of both neighbours' times
10^(SHIFTED_OWN w), couplings the mean of the neighbours' plus SHIFTED_COUPLING sqrt(h_k h_l) w,
with w standard normal.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from isingcut.ising.constraints import LinearConstraint, count, kind_counts
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.problem import Problem

SIZES = ["32x16", "40x12", "52x13", "80x8", "80x16", "80x24", "80x40", "126x63"]
SIZES += ["159x16", "159x40"]
MEASURED_M = (4, 8, 12, 15)
DATA = Path(__file__).parent / "data"
# Measured on SmolLM2-135M (KL of 1,024 tokens): 29 own terms, 31 couplings.
SHIFTED_OWN = 0.18
SHIFTED_COUPLING = 0.12


@dataclass(frozen=True)
class Instance:
    """One row of the benchmark; ``size`` is NxM and groups the families."""

    size: str
    family: str
    problem: Problem


def generate(n: int, family: str, seed: int = 0) -> Hamiltonian:
    """The Hamiltonian of the recipe above."""
    rng = np.random.default_rng([seed, n, {"psd": 0, "indefinite": 1}[family]])
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
    return Hamiltonian.from_quadratic(Q, meta={"family": family, "seed": seed})


def generated(size: str, seed: int = 0) -> list[Instance]:
    """The families of one size ``NxM``; N = 52 is the hybrid with three kinds, 159 is shifted."""
    n, m = (int(v) for v in size.split("x"))
    if n == 159:
        aligned = {f: generate(80, f, seed) for f in ("psd", "indefinite")}
        energies = {family: shifted(ham, seed) for family, ham in aligned.items()}
        small = _read(DATA / "smollm2-135m-pairwise.json")
        energies["pairwise"] = shifted(stretched(small, 80), seed, small.n / 80)
        rows = [count(n, m), *apart(n)]
        return [Instance(size, family, Problem(ham, rows)) for family, ham in energies.items()]
    if n == 52:
        kinds = ["attention" if i % 13 == 6 else ("mamba", "mlp")[i % 2] for i in range(n)]
        attention = 1
        rows = kind_counts(
            kinds,
            {"attention": attention, "mlp": (m - 1) // 2, "mamba": m - attention - (m - 1) // 2},
        )
        return [Instance(size, "kinds", Problem(generate(n, "indefinite", seed), rows))]
    return [
        Instance(size, family, Problem(generate(n, family, seed), [count(n, m)]))
        for family in ("psd", "indefinite")
    ]


def apart(n: int) -> list[LinearConstraint]:
    """Neighbouring variables exclude each other: they would remove one sublayer twice."""
    pairs = np.eye(n) + np.eye(n, k=1)
    return [LinearConstraint(f"apart {k}", pairs[k], "<=", 1) for k in range(n - 1)]


def stretched(ham: Hamiltonian, n: int) -> Hamiltonian:
    """The same energy as a function of the removed fraction, for n blocks instead of N."""
    old, new = np.linspace(0, 1, ham.n), np.linspace(0, 1, n)
    P = np.array([np.interp(new, old, unit) for unit in np.eye(ham.n)]).T
    # A block's coupling to itself is unknown: the mean of those to its neighbours stands for it.
    beside = np.concatenate([np.diagonal(ham.J, 1)[:1], np.diagonal(ham.J, 1)])
    J = P @ (ham.J + np.diag((beside + np.append(beside[1:], beside[-1])) / 2)) @ P.T
    np.fill_diagonal(J, 0.0)
    scale = ham.n / n
    return Hamiltonian(scale * np.exp(P @ np.log(ham.h)), scale**2 * J, meta=dict(ham.meta))


def shifted(aligned: Hamiltonian, seed: int, scale: float = 1.0) -> Hamiltonian:
    """The 2 N - 1 variables of the recipe above for a Hamiltonian over N blocks.

    ``scale``: of its couplings, relative to own terms, against those the spread was measured on.
    """
    n = aligned.n
    rng = np.random.default_rng([seed, n, 2])
    k = np.arange(2 * n - 1)
    left, right, odd = k // 2, (k + 1) // 2, k % 2
    h = np.sqrt(aligned.h[left] * aligned.h[right])
    h *= 10 ** (SHIFTED_OWN * odd * rng.normal(size=k.size))
    total, known = np.zeros((k.size, k.size)), np.zeros((k.size, k.size))
    for a in (left, right):
        for b in (left, right):
            total += aligned.J[np.ix_(a, b)]
            known += np.not_equal.outer(a, b)
    noise = rng.normal(size=(k.size, k.size))
    noise = (noise + noise.T) / np.sqrt(2) * np.maximum.outer(odd, odd)
    J = total / np.maximum(known, 1) + scale * SHIFTED_COUPLING * np.sqrt(np.outer(h, h)) * noise
    J[np.abs(np.subtract.outer(k, k)) <= 1] = 0.0
    return Hamiltonian(h, J, meta={**aligned.meta, "seed": seed})


def measured(path: Path | None = None) -> list[Instance]:
    """Instances of a Hamiltonian file, or of the two SmolLM2-135M ones kept beside this file."""
    if path is not None:
        found = {path.stem if path.stem != "hamiltonian" else path.parent.name: _read(path)}
    else:
        found = {
            p.stem.removeprefix("smollm2-135m-"): _read(p) for p in sorted(DATA.glob("*.json"))
        }
    return [
        Instance(f"{ham.n}x{m}", name, Problem(ham, [count(ham.n, m)]))
        for name, ham in found.items()
        for m in MEASURED_M
        if m <= ham.n
    ]


def _read(path: Path) -> Hamiltonian:
    if path.suffix != ".json":
        return Hamiltonian.load(path)
    data = json.loads(path.read_text(encoding="utf-8"))
    J = np.zeros((len(data["h"]),) * 2)
    J[np.triu_indices(len(data["h"]), 1)] = data["J_upper"]
    return Hamiltonian(np.array(data["h"]), J + J.T, data["c"], data["unit"], data["meta"])


def write_json(ham: Hamiltonian, path: Path) -> None:
    """Keep a measured Hamiltonian as a small JSON file."""
    upper = ham.J[np.triu_indices(ham.n, 1)]
    data = {
        "unit": ham.unit,
        "c": ham.c,
        "meta": dict(ham.meta),
        "h": [float(f"{v:.9g}") for v in ham.h],
        "J_upper": [float(f"{v:.9g}") for v in upper],
    }
    path.write_text(json.dumps(data) + "\n", encoding="utf-8")
