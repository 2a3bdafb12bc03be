"""`hessian`: the second-order Taylor expansion of the mean token NLL in the gates.

    E(x) = -g.x + x^T H x / 2

with g and H the exact gradient and Hessian at the original model, in gates shared by all
tokens. Removing blocks is the step alpha - 1 = -x, so long that the expansion at alpha = 1 is
only a guide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from isingcut.data.calibration import TokenSet
from isingcut.energies._quadratic import curvature_energy
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.measure.work import Work
from isingcut.models.replay import Replay

__all__ = ["Hessian"]


@dataclass(frozen=True)
class Hessian:
    """The exact second-order energy of the NLL, in nats per token.

    Attributes:
        gate: ``"sublayer"`` or ``"block"``.
    """

    default_samples: ClassVar[int] = 16
    streams: ClassVar[bool] = False

    gate: str = "sublayer"

    def measure(self, replay: Replay, tokens: TokenSet, work: Work) -> Hamiltonian:
        """Compute gradient and Hessian and form the energy.

        Returns:
            Hamiltonian; unit ``"nats/token"``, with standard errors over samples.

        Complexity: about 2 N forward passes; more where the head is large.
        """
        return curvature_energy("hessian", "mean token NLL", self.gate, replay, tokens, work)
