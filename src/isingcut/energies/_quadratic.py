"""Convert gate derivatives to a Hamiltonian, with its error over samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from isingcut.data.calibration import TokenSet
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.states import Floats
from isingcut.measure.curvature import gate_curvature
from isingcut.measure.losses import standard_error
from isingcut.measure.work import Work
from isingcut.models.replay import Replay


def quadratic(
    gradient_sums: Floats,
    curvature_sums: Floats,
    counts: npt.NDArray[np.int64],
    meta: dict[str, Any],
) -> Hamiltonian:
    """Form E(x) = -g.x + x^T C x / 2, the Taylor expansion of a removal: the gates step by -x.

    x_i^2 = x_i moves half the diagonal of C into the own terms.

    Args:
        gradient_sums: (m, N) gradient of each sample's loss, summed over its tokens, nats.
        curvature_sums: (m, N, N) second derivatives of the same sums; symmetrised here.
        counts: (m,) tokens of each sample; g and C are the sums over all tokens, per token.
        meta: provenance.

    Returns:
        Hamiltonian in ``"nats/token"``; with standard errors for two samples or more.
    """
    curvature = (curvature_sums + curvature_sums.transpose(0, 2, 1)) / 2
    own = np.diagonal(curvature, axis1=1, axis2=2) / 2 - gradient_sums  # (m, N)
    total = counts.sum()
    J = curvature.sum(0) / total
    np.fill_diagonal(J, 0.0)
    h_error = J_error = None
    if counts.size > 1:
        h_error = standard_error(own.T, counts)
        J_error = standard_error(np.moveaxis(curvature, 0, -1), counts)
        np.fill_diagonal(J_error, 0.0)
    return Hamiltonian(own.sum(0) / total, J, meta=meta, h_error=h_error, J_error=J_error)


def curvature_energy(
    kind: str, loss: str, gate: str, replay: Replay, tokens: TokenSet, work: Work
) -> Hamiltonian:
    """Measure the Taylor expansion of a loss from its exact derivatives, see `quadratic`.

    Args:
        kind: ``"hessian"`` or ``"gauss-newton"``. The KL, the loss of the latter, has no gradient
            at the original model.
        loss: the loss in words, for the provenance.
        gate: ``"sublayer"`` or ``"block"``.
    """
    found = gate_curvature(replay, tokens, kind, work, gate=gate)
    meta = {
        "energy": kind,
        "loss": loss,
        "gate": gate,
        "samples": tokens.samples,
        "tokens": tokens.tokens,
    }
    gradient = found.gradient_sums if kind == "hessian" else np.zeros_like(found.gradient_sums)
    return quadratic(gradient, found.curvature_sums, found.counts, meta)
