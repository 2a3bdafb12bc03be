"""The ranked result of a solver: distinct feasible states, sorted by energy.

`Spectrum.from_states` does not rely on the solver: it recomputes energies in float64 from the
Hamiltonian, rejects states that violate a constraint, and merges duplicates.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from isingcut.errors import InputError
from isingcut.files.results import read_document, without_infinities, write_json
from isingcut.files.states import SpectrumFile
from isingcut.ising.problem import Problem
from isingcut.ising.states import Floats, States, blocks_of, states_of

PLAIN = ("unit", "solver", "seconds", "proven", "lower_bound")
"""Attributes of a spectrum that its file holds as they are."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    """K distinct states, sorted by energy.

    Args:
        states: (K, N) bool, True = removed.
        energies: (K,) in ``unit``, ascending; ties are ordered by the state's bits.
        proven: whether these are the K lowest states, up to rounding (1e-9 of the coefficients'
            absolute sum) and up to the choice among states tied with the last one.
        lower_bound: proven lower bound on the ground-state energy, or None.
        solver: name of the solver.
        seconds: wall-clock time of the solve.
        unit: unit of the Hamiltonian.
        info: statistics from the solver.

    Examples:
        >>> spectrum = isingcut.Spectrum.load("my-run/spectrum.json")
        >>> len(spectrum.removed(0)), float(spectrum.gaps[0])
        (3, 0.0)
    """

    states: States
    energies: Floats
    proven: bool
    lower_bound: float | None
    solver: str
    seconds: float
    unit: str = "arbitrary"
    info: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        proof = "proven lowest" if self.proven else "best found, not proven"
        lines = [
            f"{len(self)} states by {self.solver or 'no solver'}, {proof}; {self.unit}"
        ]
        for k, energy in enumerate(self.energies):
            lines.append(
                f"{k:4} {energy:11.5g}  without {' '.join(map(str, self.removed(k)))}"
            )
        return "\n".join(lines)

    @classmethod
    def from_states(
        cls,
        problem: Problem,
        states: ArrayLike,
        k: int | None = None,
        solver: str = "",
    ) -> Spectrum:
        """Sort a solver's states, merge duplicates and keep the lowest; nothing is proven of them.

        Raises:
            InputError: a state violates a constraint.
        """
        x = np.asarray(states).astype(np.bool_).reshape(-1, problem.n)
        feasible = problem.feasible(x)
        if not feasible.all():
            bad = x[~feasible][0]
            raise InputError(
                f"solver {solver!r} returned a state that violates: "
                + "; ".join(problem.violations(bad))
            )
        x = np.unique(x, axis=0)
        energies = problem.hamiltonian.energies(x)
        # Energies that are equal up to rounding must not be ordered by their rounding errors.
        grain = 1e-13 * max(problem.hamiltonian.scale, 1e-300)
        order = np.argsort(np.round(energies / grain), kind="stable")[:k]
        return cls(
            x[order],
            energies[order],
            False,
            None,
            solver,
            0.0,
            problem.hamiltonian.unit,
        )

    def __len__(self) -> int:
        return int(self.states.shape[0])

    @property
    def gaps(self) -> Floats:
        """The energies (K,) above the ground state."""
        gaps: Floats = self.energies - self.energies[0]
        return gaps

    @property
    def relative_gap(self) -> float | None:
        """(best - lower bound) / |best|: 0 with a proof, None without a bound."""
        if self.proven:
            return 0.0
        if self.lower_bound is None or not len(self):
            return None
        best = float(self.energies[0])
        distance = max(best - self.lower_bound, 0.0)
        return (
            distance / abs(best) if best else (0.0 if distance == 0 else float("inf"))
        )

    def removed(self, rank: int = 0) -> list[int]:
        """Return the removed blocks of the state at ``rank``, ascending."""
        return blocks_of(self.states[rank])

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-able content, with states as lists of removed blocks."""
        return {
            "n": int(self.states.shape[1]),
            **{name: getattr(self, name) for name in PLAIN},
            "relative_gap": self.relative_gap,
            "info": dict(self.info),
            "states": [
                {"rank": rank, "energy": float(energy), "removed": self.removed(rank)}
                for rank, energy in enumerate(self.energies)
            ],
        }

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a JSON file, atomically."""
        target = Path(path)
        write_json(target, SpectrumFile.kind, without_infinities(self.to_dict()))
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Spectrum:
        """Read a file that `save` wrote.

        Raises:
            StageFileError: the file is missing, damaged, of a later version, or of another program.
        """
        file = read_document(Path(path), SpectrumFile)
        return cls(
            states_of(file.n, (state.removed for state in file.states)),
            np.array([state.energy for state in file.states], dtype=np.float64),
            info=file.info,
            **{name: getattr(file, name) for name in PLAIN},
        )
