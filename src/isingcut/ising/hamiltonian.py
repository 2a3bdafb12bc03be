"""The energy of a state: a quadratic form over binaries, with units and provenance.

    E(x) = c + h.x + sum_{i<j} J_ij x_i x_j,     x_i = 1 means block i is removed.

In spins s_i = 2 x_i - 1 the same energy is an Ising model (`Hamiltonian.to_bqm`); removing
exactly M of N blocks fixes its magnetisation to 2 M - N.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from isingcut.errors import InputError
from isingcut.files.results import damaged_error, read_tensors, write_tensors
from isingcut.files.states import HamiltonianHeader
from isingcut.ising.states import Floats

if TYPE_CHECKING:
    import dimod


_LARGEST = 1e100
"""Largest size of a coefficient: sums of coefficients, and squares of these, stay finite."""


def _finite(
    name: str, value: ArrayLike, shape: tuple[int, ...] | None = None
) -> Floats:
    try:
        given = np.asarray(value)
        if np.iscomplexobj(given):
            raise TypeError("it has complex numbers")
        array = np.array(given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} must be an array of real numbers: {error}") from None
    if shape is not None and array.shape != shape:
        raise InputError(f"{name} must have shape {shape}, got {array.shape}")
    # NaN fails the comparison too.
    if not (small := np.abs(array) <= _LARGEST).all():
        where = np.argwhere(~small)[0].tolist()
        raise InputError(
            f"{name} must be finite and at most {_LARGEST:g} in size; entry {where} is "
            f"{array[tuple(where)]}"
        )
    array.setflags(write=False)
    return array


def _symmetric(name: str, array: Floats) -> Floats:
    scale = float(np.abs(array).max(initial=0.0))
    skew = float(np.abs(array - array.T).max(initial=0.0))
    if skew > 1e-9 * scale:
        raise InputError(
            f"{name} must be symmetric, but differs from its transpose by up to {skew:.3g}; "
            f"pass ({name} + {name}.T) / 2 if you mean the form x.{name}.x"
        )
    array = (array + array.T) / 2
    array.setflags(write=False)
    return array


@dataclass(frozen=True, eq=False)
class Hamiltonian:
    """A quadratic energy over N binaries.

    Args:
        h: (N,) own terms.
        J: (N, N) couplings, symmetric with a zero diagonal; each pair counts once.
        c: energy of the state that removes nothing.
        unit: ``"nats/token"`` or ``"arbitrary"``.
        meta: JSON-able provenance.
        h_error: (N,) standard errors of ``h``, if measured.
        J_error: (N, N) standard errors of ``J``.

    Raises:
        InputError: wrong shapes, entries that are not finite, or a J that is not symmetric or has a
            diagonal.

    Examples:
        >>> energy = isingcut.Hamiltonian(h=[1.0, 2.0], J=[[0.0, 0.5], [0.5, 0.0]])
        >>> energy.energies([[0, 0], [1, 0], [1, 1]]).tolist()
        [0.0, 1.0, 3.5]
    """

    h: Floats
    J: Floats
    c: float = 0.0
    unit: str = "nats/token"
    meta: Mapping[str, Any] = field(default_factory=dict)
    h_error: Floats | None = None
    J_error: Floats | None = None

    def __post_init__(self) -> None:
        h = _finite("h", self.h)
        if h.ndim != 1 or not h.size:
            raise InputError(
                f"h must be a vector with at least one entry, got shape {h.shape}"
            )
        n = h.size
        J = _symmetric("J", _finite("J", self.J, (n, n)))
        if np.diagonal(J).any():
            raise InputError(
                "J must have a zero diagonal; put own terms into h (x_i^2 = x_i)"
            )
        checked = {"h": h, "J": J, "c": float(_finite("c", self.c, ()))}
        if self.h_error is not None:
            checked["h_error"] = _finite("h_error", self.h_error, (n,))
        if self.J_error is not None:
            error = _finite("J_error", self.J_error, (n, n))
            checked["J_error"] = _symmetric("J_error", error)
        # The dataclass is frozen.
        vars(self).update(checked, meta=dict(self.meta))

    @classmethod
    def from_quadratic(
        cls, matrix: ArrayLike, c: float = 0.0, unit: str = "arbitrary", **rest: Any
    ) -> Hamiltonian:
        """Make the Hamiltonian of E(x) = c + x^T Q x, for any square Q (x_i^2 = x_i)."""
        q = _finite("a quadratic form", matrix)
        if q.ndim != 2 or q.shape[0] != q.shape[1]:
            raise InputError(
                f"a quadratic form needs a square matrix, got shape {q.shape}"
            )
        coupling = q + q.T
        np.fill_diagonal(coupling, 0.0)
        return cls(np.diagonal(q).copy(), coupling, c, unit, **rest)

    @property
    def n(self) -> int:
        """The number of blocks N."""
        return int(self.h.shape[0])

    @property
    def scale(self) -> float:
        """The sum of the absolute coefficients; rounding errors of energies scale with it."""
        return float(abs(self.c) + np.abs(self.h).sum() + np.abs(self.J).sum() / 2)

    def energies(self, states: ArrayLike) -> Floats:
        """Return the energies (S,) of states (S, N), 0/1 or bool; O(S N^2)."""
        x = np.asarray(states)
        if x.ndim != 2 or x.shape[1] != self.n:
            raise InputError(f"states must have shape (S, {self.n}), got {x.shape}")
        if x.dtype != np.bool_ and not np.isin(x, (0, 1)).all():
            raise InputError(
                "states must contain only 0 and 1 (1 = the block is removed)"
            )
        x = x.astype(np.float64)
        energies: Floats = self.c + x @ self.h + 0.5 * ((x @ self.J) * x).sum(axis=1)
        return energies

    def energy(self, state: ArrayLike) -> float:
        """Return the energy of one state (N,)."""
        return float(self.energies(np.asarray(state)[None])[0])

    # dimod ----------------------------------------------------------------------------

    def to_bqm(self) -> dimod.BinaryQuadraticModel:
        """Return the energy as a dimod BQM over the variables 0 .. N-1, without constraints.

        Its `spin` is the Ising model.
        """
        import dimod

        return dimod.BinaryQuadraticModel(self.h, np.triu(self.J), self.c, "BINARY")

    # files ----------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write tensors and metadata to one safetensors file, atomically."""
        tensors = {"h": self.h, "J": self.J, "c": np.array([self.c])}
        errors = {"h_error": self.h_error, "J_error": self.J_error}
        tensors |= {name: error for name, error in errors.items() if error is not None}
        target = Path(path)
        kind = HamiltonianHeader.kind
        write_tensors(target, kind, tensors, unit=self.unit, meta=self.meta)
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Hamiltonian:
        """Read a file that `save` wrote.

        Raises:
            StageFileError: the file is missing, damaged, of a later version, or of another program.
        """
        source = Path(path)
        header, tensors = read_tensors(source, HamiltonianHeader)
        try:
            c = tensors.pop("c")[0]
            return cls(c=c, unit=header["unit"], meta=header["meta"], **tensors)
        except (InputError, LookupError, TypeError) as e:
            # A tensor is missing or unknown, or does not fit the others.
            raise damaged_error(source, str(e)) from e
