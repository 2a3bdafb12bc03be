"""`empirical-fisher`: the energy of arXiv 2602.00161, from gate gradients at the original model.

With A (m x N) the gradients of each sample's mean token NLL in the sublayer gates and
x_i = 1 for a removed block, the paper's energy is E = x^T (A^T A / m) x: the empirical Fisher
matrix replaces the Hessian, without the linear term and the Taylor factor 1/2.
`linear=True` is the Taylor expansion itself: E = -g.x + x^T (A^T A / m) x / 2, with g the
mean gradient (removing a block is the step alpha - 1 = -x).

The empirical Fisher matrix, which takes its labels from the text, is in general not a Hessian
(Kunstner, Balles, Hennig, arXiv 1905.12558). The energies `fisher` and `gauss-newton` are the
curvature that it is often mistaken for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from isingcut.data.tokens import TokenSet
from isingcut.energies._quadratic import describe_energy
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.states import Floats
from isingcut.measure.gradients import gate_gradients
from isingcut.measure.work import Work
from isingcut.models.replay import Replay

__all__ = ["EmpiricalFisher"]


@dataclass(frozen=True)
class EmpiricalFisher:
    """The paper's energy.

    Attributes:
        linear: whether to add the gradient term and the Taylor factor 1/2.
        gate: ``"sublayer"`` as in the paper, or ``"block"``.
    """

    default_samples: ClassVar[int] = 256

    linear: bool = False
    gate: str = "sublayer"

    def measure(self, replay: Replay, tokens: TokenSet, work: Work) -> Hamiltonian:
        """Measure the gradient matrix and form the energy.

        Returns:
            Hamiltonian, with standard errors over samples for two samples or more. The unit is
            ``"arbitrary"`` for the paper's form (which uses squared nats per token instead of
            nats), and ``"nats/token"`` with the linear term.
        """
        rows = gate_gradients(replay, tokens, work, gate=self.gate)
        h, J = energy_terms(rows, linear=self.linear)
        options = {"gate": self.gate, "linear": self.linear}
        meta = describe_energy("empirical-fisher", "mean token NLL per sample", tokens, **options)
        h_error = J_error = None
        if tokens.samples > 1:
            h_error, J_error = energy_errors(rows, linear=self.linear)
        unit = "nats/token" if self.linear else "arbitrary"
        return Hamiltonian(h, J, unit=unit, meta=meta, h_error=h_error, J_error=J_error)


def energy_terms(rows: Floats, *, linear: bool) -> tuple[Floats, Floats]:
    """Compute own terms (N,) and couplings (N, N) from gradient rows (m, N).

    Because x_i^2 = x_i, the diagonal of the quadratic form is added to the own terms. Each pair
    counts once in J and twice in the form.
    """
    fisher = rows.T @ rows / len(rows)
    diagonal = np.diag(fisher).copy()
    couplings = 2 * fisher
    np.fill_diagonal(couplings, 0.0)
    if linear:
        return diagonal / 2 - rows.mean(0), couplings / 2
    return diagonal, couplings


def energy_errors(rows: Floats, *, linear: bool) -> tuple[Floats, Floats]:
    """Compute standard errors over samples of `energy_terms`, (N,) and (N, N); needs m > 1.

    Every term is a mean over samples, of a_i^2 or a_i^2 / 2 - a_i and of 2 a_i a_j or a_i a_j.
    Its standard error is the square root of its sample variance over m, exactly as by jackknife.

    Complexity: O(m N^2) time, O(m N + N^2) memory: var(a_i a_j) comes from a product of squares.
    """
    m = len(rows)
    squares = rows**2
    own = squares / 2 - rows if linear else squares
    h_error = own.std(0, ddof=1) / np.sqrt(m)
    products = squares.T @ squares / m - (rows.T @ rows / m) ** 2
    # Rounding may make a zero variance slightly negative.
    J_error = (1 if linear else 2) * np.sqrt(np.maximum(products, 0.0) / (m - 1))
    np.fill_diagonal(J_error, 0.0)
    return h_error, J_error
