"""Ridge regression from normal equations, its strength chosen on held-out rows.

Rows are never kept: only their second moments are, in float64, so memory does not grow with the
number of tokens. Cost: F (F + D) per row to accumulate, F^3 / 3 + 3 D F^2 for every ridge tried,
about five of them. Memory: three (F, F) matrices, for a layer that reads F = 14,336 numbers 4.9 GB;
they are in host memory where a device has no room for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

STRENGTHS = tuple(10.0**k for k in range(-7, 3))
"""Ridge strengths tried, relative to the mean eigenvalue of the features' second moments."""
_SMALL = 1e-200
"""A mean eigenvalue of nothing, so that features which are all zero can be solved for."""


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
        place = self.xx.device
        x, t, weights = x.to(place).double(), t.to(place).double(), weights.to(place).double()
        weighted = t * weights[:, None]
        self.xx.addmm_((x * weights[:, None]).T, x)
        self.tx.addmm_(weighted.T, x)
        self.tt += (weighted * t).sum()
        self.rows += len(x)

    def absorb(self, other: Moments) -> None:
        """Count all rows of others in."""
        self.xx += other.xx
        self.tx += other.tx
        self.tt += other.tt
        self.rows += other.rows


def bytes_of(features: int) -> int:
    """Memory of a fit: the second moments of both sets of rows, and a factor of one of them."""
    return 3 * 8 * features**2


@dataclass(frozen=True)
class RidgeFit:
    """A fitted map and how it was chosen.

    Attributes:
        map: (D, F) float64; t is approximated by map x.
        strength: ridge strength relative to the mean eigenvalue.
        held_out: share of the held-out error that is left by a map of the other rows alone.
    """

    map: Tensor
    strength: float
    held_out: float


def fit_ridge(
    fit: Moments, held_out: Moments, left: Callable[[Tensor], float] | None = None
) -> RidgeFit | None:
    """Minimise sum |t - map x|^2 + ridge |map|^2 on the fit, the ridge chosen on held-out rows.

    The map of the chosen strength is then fitted to both sets of rows together: ``fit`` holds all
    of them afterwards.

    Args:
        left: share of the held-out error that a map leaves; None: of the held-out squares.

    Returns:
        None where no map is better than none.
    """

    def squares_left(found: Tensor) -> float:
        cross = (found * held_out.tx).sum()
        squares = ((found @ held_out.xx) * found).sum()
        return float((held_out.tt - 2 * cross + squares) / held_out.tt)

    strength, error = best_strength(lambda s: (left or squares_left)(ridge_map(fit, s)))
    # Not a number is no gain either.
    if not error < 1:
        return None
    fit.absorb(held_out)
    return RidgeFit(ridge_map(fit, strength), strength, error)


def best_strength(left: Callable[[float], float]) -> tuple[float, float]:
    """The ridge strength with the least error, found by walking downhill from the middle.

    Args:
        left: the error of a strength.

    Returns:
        the strength and its error.
    """
    known: dict[int, float] = {}

    def error(k: int) -> float:
        if not 0 <= k < len(STRENGTHS):
            return float("inf")
        if k not in known:
            known[k] = left(STRENGTHS[k])
        return known[k]

    at = len(STRENGTHS) // 2
    while error(next_to := min((at - 1, at + 1), key=error)) < error(at):
        at = next_to
    return STRENGTHS[at], error(at)


def ridge_map(rows: Moments, strength: float) -> Tensor:
    """The map (D, F) of one ridge strength."""
    ridged = rows.xx.clone()
    diagonal = ridged.diagonal()
    diagonal += strength * diagonal.mean().clamp_min(_SMALL)
    torch.linalg.cholesky(ridged, out=ridged)
    return torch.cholesky_solve(rows.tx.T, ridged).T
