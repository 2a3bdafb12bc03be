"""What energies share: forms of a Hamiltonian with standard errors, its provenance, its price."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from isingcut.data.tokens import TokenSet
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.states import Floats, States
from isingcut.measure.losses import standard_error, tree_nodes


@dataclass(frozen=True)
class Price:
    """What an energy computes on each of its samples, for estimates of its time and memory.

    Attributes:
        passes: forward passes of the blocks, or as many backward passes take.
        heads: passes of the output head.
        gradients: whether it runs backward through the blocks.
        seconds: the time that it takes whatever the model is, if it has such a limit.
    """

    passes: float
    heads: float
    gradients: bool = False
    seconds: float | None = None


def price_states(states: States) -> Price:
    """Return the price of measuring states (S, N) and the original, with shared prefixes."""
    return Price(1 + tree_nodes(states) / states.shape[1], 1 + len(states))


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
    return Hamiltonian(
        own.sum(0) / total, J, meta=meta, h_error=h_error, J_error=J_error
    )


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


def describe_energy(
    energy: str, loss: str, tokens: TokenSet, **options: Any
) -> dict[str, Any]:
    """Return the provenance of an energy that was measured on ``tokens``."""
    measured = {"samples": tokens.samples, "tokens": tokens.tokens}
    return {"energy": energy, "loss": loss, **options, **measured}
