"""Ridge regression for the maps of a patch, its strength chosen on validation rows.

Only second moments are kept, so memory does not grow with the number of tokens. Products of rows
and the comparison of strengths are in float32, sums of products and the final map in float64.
Cost: F (5 F / 8 + D) per row to accumulate, F^3 / 3 + 3 D F^2 for each of about five ridge
strengths. Memory: four (F, F) and four (D, F) matrices, 8.5 GB for a layer with 14,336 inputs and
4,096 outputs; in host memory if they do not fit the device. With at most F rows, the rows
themselves are kept: the solution is the same, and costs 5 n^2 F / 4 once and, for each strength,
a^3 / 3 + 2 n a D with a rows to fit on. Products of float32 are PyTorch's "highest" precision, the
default: with TF32, small strengths would fail.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

STRENGTHS = tuple(10.0**k for k in range(-7, 8))
"""Ridge strengths tried, relative to the mean eigenvalue of the features' second moments."""
_ROWS = 1024
"""Rows of a product in float32; their sums are float64."""
_PANELS = 4
"""Panels of columns of a symmetric product, so that 5/8 of it are computed."""


class Moments:
    """Weighted second moments of features x (n, F) and targets t (n, D), summed in float64."""

    def __init__(self, features: int, targets: int, device: torch.device) -> None:
        self.device = device
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        # Only the lower half is needed, and complete.
        self.xx = zeros((features, features))
        self.tx = zeros((targets, features))
        self.tt = zeros(())

    def add(self, x: Tensor, t: Tensor, weights: Tensor) -> None:
        """Add rows with their weights (n,)."""
        for rows in zip(*(torch.split(p, _ROWS) for p in (x, t, weights)), strict=True):
            some, target, weight = (p.to(self.device) for p in rows)
            root = weight.sqrt()[:, None]
            self._add_scaled((some * root).float(), (target * root).float())

    def _add_scaled(self, x: Tensor, t: Tensor) -> None:
        """Add rows times the root of their weights, float32."""
        _add_products(self.xx, x)
        self.tx += t.T @ x
        self.tt += t.square().sum()

    def join(self, other: Moments) -> None:
        """Add the rows of ``other``."""
        self.xx += other.xx
        self.tx += other.tx

    def map(self, strength: float, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return the map (D, F) of one ridge strength, computed in ``dtype``."""
        return _solve(self.xx, self.tx.T, strength / len(self.xx), dtype).T

    def error(self, strength: float, held_out: Moments, dtype: torch.dtype) -> float:
        """Return the share of the weighted squares of other rows' t that a map leaves."""
        change = self.map(strength, dtype)
        # Half of the symmetric matrix gives half of its quadratic form.
        half = held_out.xx.tril().to(dtype)
        half.diagonal().mul_(0.5)
        less = ((held_out.tx - change @ half) * change).sum()
        return float(1 - 2 * less / held_out.tt)


class Rows(Moments):
    """The same for at most as many rows as features: the rows are kept, as float32.

    With rows scaled by the root of their weights, (X^T X + r)^-1 X^T T = X^T (X X^T + r)^-1 T.
    """

    def __init__(self, features: int, targets: int, device: torch.device) -> None:
        self.device = device
        self.x = torch.zeros((0, features), device=device)
        self.t = torch.zeros((0, targets), device=device)
        self.products = torch.empty(0)

    def _add_scaled(self, x: Tensor, t: Tensor) -> None:
        self.x, self.t = torch.cat([self.x, x]), torch.cat([self.t, t])

    def join(self, other: Moments) -> None:
        assert isinstance(other, Rows)
        self._add_scaled(other.x, other.t)

    def map(self, strength: float, dtype: torch.dtype = torch.float64) -> Tensor:
        return (self._dual(strength, dtype, self.x).float().T @ self.x).to(dtype)

    def error(self, strength: float, held_out: Moments, dtype: torch.dtype) -> float:
        assert isinstance(held_out, Rows)
        dual = self._dual(strength, dtype, torch.cat([self.x, held_out.x]))
        n = len(dual)
        rest = held_out.t - self.products[n:, :n].to(dtype) @ dual
        return float(rest.square().sum() / held_out.t.square().sum())

    def _dual(self, strength: float, dtype: torch.dtype, rows: Tensor) -> Tensor:
        """Return the coefficients (n, D) of the own rows.

        Args:
            rows: those to keep the products of, the own ones first.
        """
        if len(self.products) < len(rows):
            self.products = rows.new_zeros(len(rows), len(rows), dtype=torch.float64)
            for some in torch.split(rows.T, _ROWS):
                _add_products(self.products, some)
        n, features = self.x.shape
        return _solve(self.products[:n, :n], self.t, strength / features, dtype)


def _add_products(total: Tensor, x: Tensor) -> None:
    """Add x^T x (F, F) to the lower half of a total; some entries above it are added too."""
    width = math.ceil(len(total) / _PANELS)
    for start in range(0, len(total), width):
        end = start + width
        total[start:end, :end] += x[:, start:end].T @ x[:, :end]


def _solve(
    products: Tensor, right: Tensor, strength: float, dtype: torch.dtype
) -> Tensor:
    """Solve (products + r) s = right in ``dtype``.

    Args:
        products: symmetric; only the lower half is read.
        strength: r relative to the trace of ``products``.

    Raises:
        LinAlgError: the matrix is not positive definite, by rounding or because all is zero.
    """
    ridged = products.to(dtype, copy=True)
    ridged.diagonal().add_(strength * products.trace())
    factor = torch.linalg.cholesky(ridged, out=ridged)
    return torch.cholesky_solve(right.to(dtype), factor)


def bytes_of(features: int, targets: int) -> int:
    """Return the bytes of a fit at its peak: four (F, F) and four (D, F) matrices of float64.

    These are the second moments of both sets of rows, the matrix of the last map, and the copies
    that torch makes of its factor and of the right side. With n <= F rows instead: three (n, n) of
    float64 and 5 n F / 4 numbers of float32, 3.6 of the four at most.
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

    def remaining(strength: float) -> float:
        for dtype in (torch.float32, torch.float64):
            with suppress(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
                return (
                    left(fit.map(strength, dtype).double())
                    if left
                    else fit.error(strength, held_out, dtype)
                )
        return math.inf

    best, error = best_strength(remaining)
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
