"""Ridge regression for the maps of a patch, its strength chosen on validation rows.

Only second moments are kept, in float64, so memory does not grow with the number of tokens.
Cost: F (F + D) per row to accumulate, F^3 / 3 + 3 D F^2 for each of about five ridge strengths.
Memory: four (F, F) and four (D, F) matrices, 8.5 GB for a layer with 14,336 inputs and 4,096
outputs; in host memory if they do not fit the device. With at most F / 2 rows, the rows themselves
are kept: the solution is the same, costs n^2 F for each strength, and takes less memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

STRENGTHS = tuple(10.0**k for k in range(-7, 8))
"""Ridge strengths tried, relative to the mean eigenvalue of the features' second moments."""
_SMALL = 1e-200
"""Smallest mean eigenvalue, so that the fit works for features that are all zero."""


class Moments:
    """Weighted second moments of features x (n, F) and targets t (n, D), float64."""

    def __init__(self, features: int, targets: int, device: torch.device) -> None:
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self.xx = zeros((features, features))
        self.tx = zeros((targets, features))
        self.tt = zeros(())

    def add(self, x: Tensor, t: Tensor, weights: Tensor) -> None:
        """Add rows with their weights (n,)."""
        # At most F at a time, so that they take no more memory than the solution.
        for rows in zip(
            *(torch.split(p, len(self.xx)) for p in (x, t, weights)), strict=True
        ):
            some, target, weight = (p.to(self.xx.device).double() for p in rows)
            weighted = target * weight[:, None]
            self.xx.addmm_((some * weight[:, None]).T, some)
            self.tx.addmm_(weighted.T, some)
            self.tt += (weighted * target).sum()

    def join(self, other: Moments) -> None:
        """Add the rows of ``other``."""
        self.xx += other.xx
        self.tx += other.tx

    def map(self, strength: float) -> Tensor:
        """Return the map (D, F) of one ridge strength."""
        ridged = self.xx.clone()
        diagonal = ridged.diagonal()
        diagonal += strength * diagonal.mean().clamp_min(_SMALL)
        return torch.cholesky_solve(
            self.tx.T, torch.linalg.cholesky(ridged, out=ridged)
        ).T

    def error(self, strength: float, held_out: Moments) -> float:
        """Return the share of the weighted squares of other rows' t that a map leaves."""
        change = self.map(strength)
        cross = (change * held_out.tx).sum()
        squares = ((change @ held_out.xx) * change).sum()
        return float((held_out.tt - 2 * cross + squares) / held_out.tt)


class Rows(Moments):
    """The same for fewer rows than features: the rows are kept, and a fit costs n^3, not F^3.

    With rows scaled by the root of their weights, (X^T X + r)^-1 X^T T = X^T (X X^T + r)^-1 T.
    """

    def __init__(self, features: int, targets: int, device: torch.device) -> None:
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self.x = zeros((0, features))
        self.t = zeros((0, targets))
        self.products: tuple[Tensor, Tensor] | None = None

    def add(self, x: Tensor, t: Tensor, weights: Tensor) -> None:
        place = self.x.device
        root = weights.double().sqrt()[:, None]
        self.x = torch.cat([self.x, (x.double() * root).to(place)])
        self.t = torch.cat([self.t, (t.double() * root).to(place)])

    def join(self, other: Moments) -> None:
        assert isinstance(other, Rows)
        self.x, self.t = torch.cat([self.x, other.x]), torch.cat([self.t, other.t])

    def map(self, strength: float) -> Tensor:
        return torch.mm(self._dual(strength, self.x @ self.x.T).T, self.x)

    def error(self, strength: float, held_out: Moments) -> float:
        assert isinstance(held_out, Rows)
        if self.products is None:
            self.products = self.x @ self.x.T, held_out.x @ self.x.T
        own, cross = self.products
        rest = held_out.t - cross @ self._dual(strength, own.clone())
        return float(rest.square().sum() / held_out.t.square().sum())

    def _dual(self, strength: float, ridged: Tensor) -> Tensor:
        """Return the coefficients (n, D) of the rows, and overwrite their products (n, n)."""
        diagonal = ridged.diagonal()
        diagonal += strength * (diagonal.sum() / self.x.shape[1]).clamp_min(_SMALL)
        return torch.cholesky_solve(self.t, torch.linalg.cholesky(ridged, out=ridged))


def bytes_of(features: int, targets: int) -> int:
    """Return the bytes of a fit at its peak: four (F, F) and four (D, F) matrices of float64.

    These are the second moments of both sets of rows, the matrix of one strength, and the copies
    that torch makes of its factor and of the right side; or the rows that are being added.
    """
    return 4 * 8 * features * (features + targets)


@dataclass(frozen=True)
class RidgeFit:
    """A fitted map and its ridge strength.

    Attributes:
        map: (D, F) float64; t is approximated by map x.
        strength: ridge strength relative to the mean eigenvalue.
        held_out: share of the validation error that remains with a map of the fit rows alone.
    """

    map: Tensor
    strength: float
    held_out: float


def fit_ridge(
    fit: Moments, held_out: Moments, left: Callable[[Tensor], float] | None = None
) -> RidgeFit | None:
    """Minimise sum |t - map x|^2 + ridge |map|^2 on ``fit``, with the ridge chosen by validation.

    The map of the chosen strength is then fitted on both sets of rows together, which ``fit``
    contains afterwards.

    Args:
        left: function of a map, the share of the validation error that remains with it; None:
            computed from ``held_out``.

    Returns:
        None if no map is better than no patch.
    """
    best, error = best_strength(
        lambda s: left(fit.map(s)) if left else fit.error(s, held_out)
    )
    # NaN is no improvement either.
    if not error < 1:
        return None
    fit.join(held_out)
    return RidgeFit(fit.map(best), best, error)


def best_strength(left: Callable[[float], float]) -> tuple[float, float]:
    """Find the ridge strength with the least error, in steps from the middle while it decreases.

    Args:
        left: function that returns the error of a strength.

    Returns:
        the strength and its error.
    """

    @cache
    def error(k: int) -> float:
        return left(STRENGTHS[k]) if 0 <= k < len(STRENGTHS) else math.inf

    at = len(STRENGTHS) // 2
    while error(next_to := min((at - 1, at + 1), key=error)) < error(at):
        at = next_to
    return STRENGTHS[at], error(at)
