"""A Bayesian quadratic energy: a prior from the pair energy, corrected by measurements.

    y(x) = a + b E0(x) + sum_i u_i x_i + sum_{i<j} v_ij x_i x_j + noise
    a ~ N(0, wide),  b ~ N(1, ..),  u_i ~ N(0, s_h^2),  v_ij ~ N(0, s_J^2)

y is the loss of a state near the requested size, E0 the measured pair energy. The model is linear
in Gaussian weights, so the posterior is Gaussian. Its mean and every sample from it are
Hamiltonians, and an exact solver can be run on each. With T measured states the work is
O(T^3 + T N^2), because it is done with the T x T kernel and not with a matrix of all couplings.

Thompson sampling with exact minimisation of the sample follows Baptista and Poloczek (BOCS),
arXiv 1806.08838; the informed prior and the noise that grows with the loss are additions to it.
"""

from typing import Any, NamedTuple

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.states import Floats, States


class Spread(NamedTuple):
    """Prior standard deviations, in units of the spread of the measured losses.

    Attributes:
        own: standard deviation of a correction to an own term.
        pair: standard deviation of a correction to a coupling.
    """

    own: float
    pair: float


GRID = tuple(Spread(own, pair) for own in (0.1, 0.3, 1.0) for pair in (0.06, 0.2, 0.6))
SLOPE = 0.3
"""Prior standard deviation of the factor b, relative to the fitted factor."""
FLOOR = 0.1
"""Model error of the quadratic form, relative to the excess of a loss over the best of its size."""


class Surrogate:
    """The posterior after T measurements.

    Args:
        prior: the pair energy E0.
        states: (T, N) measured states.
        losses: (T,) losses of the states, nats per token.
        noise: (T,) standard deviations of the measurements, nats per token.

    Attributes:
        spread: prior of `GRID` with the highest evidence.
        mean: posterior mean.
    """

    def __init__(
        self, prior: Hamiltonian, states: States, losses: Floats, noise: Floats
    ) -> None:
        self._prior = prior
        self._x = np.asarray(states, dtype=np.float64)
        self._energy = prior.energies(states)
        self._centred = self._energy - self._energy.mean()
        size = np.asarray(states).sum(1)
        best = np.array([losses[size == k].min() for k in size])
        # A quadratic form cannot fit losses that differ by a factor of 100, and high losses need no
        # exact fit. So the allowed error grows with the excess over the best state.
        self._sd = np.sqrt(
            noise**2 + (FLOOR * (losses - best)) ** 2 + (0.01 * best) ** 2
        )
        # The covariance must be positive definite even if several states have zero loss.
        self._sd = np.maximum(self._sd, 1e-6 * losses.max())
        self._a, self._b = _line(self._energy, losses, 1 / self._sd**2)
        self._y = losses - self._a - self._b * self._energy
        order = np.argsort(losses - best, kind="stable")[: max(8, len(losses) // 4)]
        self._scale = float(np.std(losses[order] - best[order])) + 0.01 * float(
            losses.min()
        )
        fits = [(spread, *self._fit(spread)) for spread in GRID]
        self.spread, _, self._factor = max(fits, key=lambda fit: fit[1])
        self.mean = self._hamiltonian(self._y)

    def _fit(self, spread: Spread) -> tuple[float, tuple[Floats, bool]]:
        """Return the log evidence of the losses, and the Cholesky factor of their covariance."""
        kernel = self._covariance(self._x @ self._x.T, spread)
        kernel = kernel + (SLOPE * self._b) ** 2 * np.outer(
            self._centred, self._centred
        )
        factor = cho_factor(kernel + np.diag(self._sd**2), lower=True)
        fit = self._y @ cho_solve(factor, self._y)
        logdet = 2 * np.log(np.diagonal(factor[0])).sum()
        return float(-(fit + logdet) / 2), factor

    def _covariance(self, inner: Floats, spread: Spread) -> Floats:
        """Return prior covariances, without b, of losses of states that share ``inner`` blocks."""
        pairs = (inner**2 - inner) / 2
        return self._scale**2 * (1.0 + spread.own**2 * inner + spread.pair**2 * pairs)

    def _hamiltonian(
        self, y: Floats, a: Any = 0.0, u: Any = 0.0, v: Any = 0.0, slope: Any = 0.0
    ) -> Hamiltonian:
        """Return the posterior mean given residuals ``y``, plus the other terms."""
        alpha = cho_solve(self._factor, y)
        s = self.spread
        scale = self._scale
        slope = (SLOPE * self._b) ** 2 * float(self._centred @ alpha) + slope
        u = (scale * s.own) ** 2 * (self._x.T @ alpha) + u
        v = (scale * s.pair) ** 2 * (self._x.T * alpha) @ self._x + v
        a = scale**2 * float(alpha.sum()) + a
        np.fill_diagonal(v, 0.0)
        v = (v + v.T) / 2
        b = self._b + slope
        return Hamiltonian(
            b * self._prior.h + u,
            b * self._prior.J + v,
            self._a + b * self._prior.c + a - slope * float(self._energy.mean()),
            unit="nats/token",
        )

    def sample(self, rng: np.random.Generator) -> Hamiltonian:
        """Draw one Hamiltonian from the posterior (Matheron's rule)."""
        n = self._x.shape[1]
        s = self.spread
        scale = self._scale
        a = scale * float(rng.standard_normal())
        u: Floats = scale * s.own * rng.standard_normal((n,))
        upper: Floats = np.triu(scale * s.pair * rng.standard_normal((n, n)), 1)
        v: Floats = upper + upper.T
        slope = SLOPE * self._b * float(rng.standard_normal())
        at = (
            a
            + self._x @ u
            + 0.5 * ((self._x @ v) * self._x).sum(1)
            + slope * self._centred
        )
        noise = self._sd * rng.standard_normal(len(at))
        return self._hamiltonian(self._y - at - noise, a, u, v, slope)

    def deviation(self, states: States) -> Floats:
        """Return (S,) posterior standard deviations of the energies of ``states``."""
        x = np.asarray(states, dtype=np.float64)
        e = self._prior.energies(states) - self._energy.mean()
        k = self._covariance(x @ self._x.T, self.spread)
        k = k + (SLOPE * self._b) ** 2 * np.outer(e, self._centred)
        prior = self._covariance(x.sum(1), self.spread) + (SLOPE * self._b * e) ** 2
        var = prior - (k * cho_solve(self._factor, k.T).T).sum(1)
        return np.asarray(np.sqrt(np.maximum(var, 0.0)))


def _line(x: Floats, y: Floats, weight: Floats) -> tuple[float, float]:
    """Fit a weighted least-squares line y = a + b x, with b kept positive."""
    w = weight / weight.sum()
    mx = float(w @ x)
    my = float(w @ y)
    var = float(w @ (x - mx) ** 2)
    b = float(w @ ((x - mx) * (y - my))) / var if var > 0 else 1.0
    b = b if b > 0 else 1e-3
    return my - b * mx, b
