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


def fit_ridge(fit: Moments, held_out: Moments) -> RidgeFit:
    """Minimise sum |t - map x|^2 + ridge |map|^2 on the fit, the ridge chosen on held-out rows.

    The map of the chosen strength is then fitted to both sets of rows together. No map at all
    (an infinite ridge) competes too.
    """
    best, left = None, 1.0
    values, basis = torch.linalg.eigh(fit.xx)
    values = values.clamp_min(0)
    unit = values.mean().clamp_min(torch.finfo(torch.float64).tiny)
    rotated = fit.tx @ basis
    other_xx, other_tx = basis.T @ held_out.xx @ basis, held_out.tx @ basis
    for strength in STRENGTHS:
        candidate = rotated / (values + strength * unit)
        cross = (candidate * other_tx).sum()
        squares = ((candidate @ other_xx) * candidate).sum()
        error = float((held_out.tt - 2 * cross + squares) / held_out.tt)
        if error < left:
            best, left = strength, error
    if best is None:
        return RidgeFit(torch.zeros_like(fit.tx), None, 1.0)
    both = fit + held_out
    unit = torch.diagonal(both.xx).mean()
    eye = torch.eye(len(both.xx), dtype=torch.float64, device=both.xx.device)
    factor = torch.linalg.cholesky(both.xx + best * unit * eye)
    return RidgeFit(torch.cholesky_solve(both.tx.T, factor).T, best, left)
