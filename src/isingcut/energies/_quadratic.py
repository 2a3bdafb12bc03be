"""Convert sums of each sample, or gate derivatives, to a Hamiltonian with standard errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from isingcut.data.tokens import TokenSet
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.states import Floats
from isingcut.measure.curvature import gate_curvature
from isingcut.measure.losses import standard_error
from isingcut.measure.work import Work
from isingcut.models.replay import Replay


def join_samples(
    own: Floats, coupled: Floats, counts: npt.NDArray[np.int64], meta: dict[str, Any]
) -> Hamiltonian:
    """Form the energy whose terms are sums over samples, divided by the number of tokens.

    Args:
        own: (m, N) own terms of each sample, summed over its tokens, nats.
        coupled: (m, N, N) symmetric couplings, summed in the same way; diagonals have no effect.
        counts: (m,) tokens of each sample.
        meta: provenance of the energy.

    Returns:
        Hamiltonian in ``"nats/token"``; with standard errors for two samples or more.
    """
    total = counts.sum()
    J = coupled.sum(0) / total
    np.fill_diagonal(J, 0.0)
    h_error = J_error = None
    if counts.size > 1:
        h_error = standard_error(own.T, counts)
        J_error = standard_error(np.moveaxis(coupled, 0, -1), counts)
        np.fill_diagonal(J_error, 0.0)
    return Hamiltonian(own.sum(0) / total, J, meta=meta, h_error=h_error, J_error=J_error)


def quadratic(
    gradient_sums: Floats,
    curvature_sums: Floats,
    counts: npt.NDArray[np.int64],
    meta: dict[str, Any],
) -> Hamiltonian:
    """Form E(x) = -g.x + x^T C x / 2, the Taylor expansion of a removal: the gates change by -x.

    Because x_i^2 = x_i, half the diagonal of C is added to the own terms.

    Args:
        gradient_sums: (m, N) gradient of each sample's loss, summed over its tokens, nats.
        curvature_sums: (m, N, N) second derivatives of the same sums; symmetrised here.
        counts, meta: as for `join_samples`, which also describes the result.
    """
    curvature = (curvature_sums + curvature_sums.transpose(0, 2, 1)) / 2
    own = np.diagonal(curvature, axis1=1, axis2=2) / 2 - gradient_sums  # (m, N)
    return join_samples(own, curvature, counts, meta)


def describe_energy(energy: str, loss: str, tokens: TokenSet, **options: Any) -> dict[str, Any]:
    """Return the provenance of an energy that was measured on ``tokens``."""
    measured = {"samples": tokens.samples, "tokens": tokens.tokens}
    return {"energy": energy, "loss": loss, **options, **measured}


@dataclass(frozen=True)
class CurvatureEnergy:
    """The Taylor expansion of a loss from its exact derivatives, see `quadratic`.

    Attributes:
        kind: ``"hessian"`` or ``"gauss-newton"``. The loss of the latter, the KL, has a zero
            gradient at the original model.
        loss: description of the loss, for the provenance.
        gate: ``"sublayer"`` or ``"block"``.
    """

    default_samples: ClassVar[int] = 16
    streams: ClassVar[bool] = False
    kind: ClassVar[str]
    loss: ClassVar[str]

    gate: str = "sublayer"

    def measure(self, replay: Replay, tokens: TokenSet, work: Work) -> Hamiltonian:
        """Compute the derivatives and form the energy.

        Returns:
            Hamiltonian; unit ``"nats/token"``, with standard errors over samples.
        """
        found = gate_curvature(replay, tokens, self.kind, work, gate=self.gate)
        meta = describe_energy(self.kind, self.loss, tokens, gate=self.gate)
        first = self.kind == "hessian"
        gradient = found.gradient_sums if first else np.zeros_like(found.gradient_sums)
        return quadratic(gradient, found.curvature_sums, tokens.counts, meta)
