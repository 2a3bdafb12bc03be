"""`gauss-newton`: the exact curvature of KL(original || gated) at the original model.

    E(x) = x^T F x / 2,   F = mean over tokens of J^T (diag(p) - p p^T) J

with J the derivative of the logits in the gates. `fisher` estimates it from sampled labels. The KL
has no gradient at the original model, so there is no linear term.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from isingcut.data.calibration import TokenSet
from isingcut.energies._quadratic import curvature_energy
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.measure.work import Work
from isingcut.models.replay import Replay

__all__ = ["GaussNewton"]


@dataclass(frozen=True)
class GaussNewton:
    """The exact second-order energy of the KL, in nats per token.

    Attributes:
        gate: ``"sublayer"`` or ``"block"``.
    """

    default_samples: ClassVar[int] = 16
    streams: ClassVar[bool] = False

    gate: str = "sublayer"

    def measure(self, replay: Replay, tokens: TokenSet, work: Work) -> Hamiltonian:
        """Compute the Gauss-Newton matrix and form the energy.

        Returns:
            Hamiltonian; unit ``"nats/token"``, with standard errors over samples.

        Complexity: about N forward passes; more where the head is large.
        """
        return curvature_energy(
            "gauss-newton", "KL(original || gated)", self.gate, replay, tokens, work
        )
