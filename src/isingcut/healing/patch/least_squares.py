"""Ridge regression from normal equations, its strength chosen on held-out rows.

Rows are never kept: only their second moments are, in float64, so memory does not grow with the
number of tokens. Cost: F^2 (D + 1) per row to accumulate, F^3 once to solve.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STRENGTHS = tuple(10.0**k for k in range(-7, 3))
"""Ridge strengths tried, relative to the mean eigenvalue of the features' second moments."""


class Moments:
    """Weighted second moments of features x (n, F) and targets t (n, D), float64."""

    def __init__(self, features: int, targets: int, device: torch.device) -> None:
        options = {"dtype": torch.float64, "device": device}
        self.xx = torch.zeros((features, features), **options)  # type: ignore[call-overload]
        self.tx = torch.zeros((targets, features), **options)  # type: ignore[call-overload]
        self.tt = torch.zeros((), **options)  # type: ignore[call-overload]
        self.rows = 0

    def add(self, x: Tensor, t: Tensor, weights: Tensor) -> None:
        """Count rows in, each with its weight (n,)."""
        x, t = x.double(), t.double()
        weighted = t * weights[:, None].double()
        self.xx += (x * weights[:, None].double()).T @ x
        self.tx += weighted.T @ x
        self.tt += (weighted * t).sum()
        self.rows += len(x)

    def __add__(self, other: Moments) -> Moments:
        total = Moments(self.xx.shape[0], self.tx.shape[0], self.xx.device)
        total.xx, total.tx, total.tt = self.xx + other.xx, self.tx + other.tx, self.tt + other.tt
        total.rows = self.rows + other.rows
        return total


@dataclass(frozen=True)
class RidgeFit:
    """A fitted map and how it was chosen.

    Attributes:
        map: (D, F) float64; t is approximated by map x.
        strength: ridge strength relative to the mean eigenvalue; None: no map is better.
        held_out: share of the held-out squares left by the map, 1 without one.
    """

    map: Tensor
    strength: float | None
    held_out: float


class RidgePath:
    """The maps of all ridge strengths for one set of rows, from one decomposition."""

    def __init__(self, fit: Moments) -> None:
        self._fit = fit
        values, self.basis = torch.linalg.eigh(fit.xx)
        self._values = values.clamp_min(0)
        self._unit = self._values.mean().clamp_min(torch.finfo(torch.float64).tiny)
        self._rotated = fit.tx @ self.basis

    def rotated(self, strength: float) -> Tensor:
        """The map (D, F) of one strength, its features in the `basis`."""
        found: Tensor = self._rotated / (self._values + strength * self._unit)
        return found

    def map(self, strength: float) -> Tensor:
        """The map (D, F) of one strength."""
        found: Tensor = self.rotated(strength) @ self.basis.T
        return found


def fit_ridge(fit: Moments, held_out: Moments) -> RidgeFit:
    """Minimise sum |t - map x|^2 + ridge |map|^2 on the fit, the ridge chosen on held-out rows.

    The map of the chosen strength is then fitted to both sets of rows together. No map at all
    (an infinite ridge) competes too.
    """
    best, left = None, 1.0
    path = RidgePath(fit)
    other_xx = path.basis.T @ held_out.xx @ path.basis
    other_tx = held_out.tx @ path.basis
    for strength in STRENGTHS:
        candidate = path.rotated(strength)
        cross = (candidate * other_tx).sum()
        squares = ((candidate @ other_xx) * candidate).sum()
        error = float((held_out.tt - 2 * cross + squares) / held_out.tt)
        if error < left:
            best, left = strength, error
    if best is None:
        return RidgeFit(torch.zeros_like(fit.tx), None, 1.0)
    return RidgeFit(ridge_map(fit + held_out, best), best, left)


def ridge_map(rows: Moments, strength: float) -> Tensor:
    """The map (D, F) of one ridge strength."""
    unit = torch.diagonal(rows.xx).mean()
    eye = torch.eye(len(rows.xx), dtype=torch.float64, device=rows.xx.device)
    factor = torch.linalg.cholesky(rows.xx + strength * unit * eye)
    return torch.cholesky_solve(rows.tx.T, factor).T
