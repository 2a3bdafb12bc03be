"""What a choosing part holds: rows of choices, as plain JSON."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from isingcut.baselines.base import Outcome
from isingcut.ising.constraints import count
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.problem import Problem
from isingcut.ising.solvers import solve


def choice(method: str, remove: int, seed: int, found: Outcome) -> dict[str, Any]:
    """One choice with its price."""
    return {
        "method": method,
        "remove": remove,
        "seed": seed,
        "removed": [int(i) for i in found.removed],
        "passes": float(found.passes),
        "heads": float(found.heads),
    }


def ground_states(energy: Hamiltonian, remove: int, k: int) -> list[tuple[int, ...]]:
    """The ``k`` states of lowest energy with so many blocks removed (fewer where few exist)."""
    spectrum = solve(Problem(energy, [count(energy.n, remove)]), k=k)
    return [tuple(spectrum.removed(rank)) for rank in range(len(spectrum))]


def plain(value: Any) -> Any:
    """The same value with numpy scalars, arrays and tuples as JSON has them."""
    convert: Callable[[Any], Any] = plain
    if isinstance(value, dict):
        return {str(k): convert(v) for k, v in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [convert(v) for v in value]
    if isinstance(value, np.generic):
        return convert(value.item())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
