"""`empirical-fisher`: the energy of arXiv 2602.00161, from gate gradients at the original model.

With A (m x N) the gradients of each sample's mean token NLL in the sublayer gates and
x_i = 1 for a removed block, the paper's energy is E = x^T (A^T A / m) x: the empirical Fisher
matrix stands for the Hessian, the linear term is dropped and the Taylor factor 1/2 with it.
`linear=True` is the Taylor expansion itself: E = -g.x + x^T (A^T A / m) x / 2, with g the
mean gradient (removing a block is the step alpha - 1 = -x).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from isingcut.blocks import Replay
from isingcut.calibration import TokenSet
from isingcut.energies.base import Work
from isingcut.gradients import gate_gradients
from isingcut.hamiltonian import Hamiltonian

__all__ = ["EmpiricalFisher"]


@dataclass(frozen=True)
class EmpiricalFisher:
    """The paper's energy.

    Attributes:
        linear: add the gradient term and the Taylor factor 1/2.
        gate: ``"sublayer"`` as the paper has it, or ``"block"``.
    """

    default_samples: ClassVar[int] = 256

    linear: bool = False
    gate: str = "sublayer"

    def measure(self, replay: Replay, tokens: TokenSet, work: Work) -> Hamiltonian:
        """Measure the gradient matrix and form the energy.

        Returns:
            Hamiltonian; unit ``"arbitrary"`` for the paper's form (squared nats per token
            stand in for nats), ``"nats/token"`` with the linear term.
        """
        rows = gate_gradients(
            replay,
            tokens,
            gate=self.gate,
            batch_tokens=work.batch_tokens,
            progress=work.progress,
            journal=work.journal,
        )
        h, J = energy_terms(rows, linear=self.linear)
        meta = {
            "energy": "empirical-fisher",
            "loss": "mean token NLL per sample",
            "gate": self.gate,
            "linear": self.linear,
            "samples": tokens.samples,
            "tokens": tokens.tokens,
        }
        unit = "nats/token" if self.linear else "arbitrary"
        return Hamiltonian(h=h, J=J, c=0.0, unit=unit, meta=meta)


def energy_terms(
    rows: npt.NDArray[np.float64], *, linear: bool
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Own terms (N,) and couplings (N, N) from gradient rows (m, N).

    x_i^2 = x_i moves the diagonal of the quadratic form into the own terms; each pair counts
    once in J and twice in the form.
    """
    fisher = rows.T @ rows / len(rows)
    diagonal = np.diag(fisher).copy()
    couplings = 2 * fisher
    np.fill_diagonal(couplings, 0.0)
    if linear:
        return diagonal / 2 - rows.mean(0), couplings / 2
    return diagonal, couplings
