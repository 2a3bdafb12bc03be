"""`empirical-fisher`: the energy of arXiv 2602.00161, from gate gradients at the original model.

With A (m x N) the gradients of each sample's mean token NLL in the sublayer gates and
x_i = 1 for a removed block, the paper's energy is E = x^T (A^T A / m) x: the empirical Fisher
matrix replaces the Hessian, without the linear term and the Taylor factor 1/2.

The empirical Fisher matrix, which takes its labels from the text, is in general not a Hessian
(Kunstner, Balles, Hennig, arXiv 1905.12558). The energy `fisher` is the curvature that
it is often mistaken for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from isingcut.data.tokens import TokenSet
from isingcut.energies.base import Price, describe_energy, quadratic
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
        gate: ``"sublayer"`` as in the paper, or ``"block"``.
    """

    default_samples: ClassVar[int] = 256

    gate: str = "sublayer"

    def measure(self, replay: Replay, tokens: TokenSet, work: Work) -> Hamiltonian:
        """Measure the gradient matrix and form the energy.

        Returns:
            Hamiltonian, with standard errors over samples for two samples or more. The unit is
            ``"arbitrary"``: squared nats per token.
        """
        rows = gate_gradients(replay, tokens, work, gate=self.gate)
        described = "empirical-fisher", "mean token NLL per sample"
        return form_energy(rows, describe_energy(*described, tokens, gate=self.gate))

    def price(self, n: int, sizes: Sequence[int]) -> Price:
        """Return what the energy computes, whatever the model."""
        return Price(2.5, 2.5, gradients=True)


def form_energy(rows: Floats, meta: dict[str, Any]) -> Hamiltonian:
    """Form the energy of gradient rows (m, N).

    It is the Taylor expansion with a zero gradient and twice the curvature.
    """
    outer = rows[:, :, None] * rows[:, None, :]
    each = np.ones(len(rows), dtype=np.int64)
    return replace(
        quadratic(np.zeros_like(rows), 2 * outer, each, meta), unit="arbitrary"
    )
