"""`hessian`: the second-order Taylor expansion of the mean token NLL in the gates.

    E(x) = -g.x + x^T H x / 2

with g and H the exact gradient and Hessian at the original model, in gates shared by all
tokens. Removing blocks is the step alpha - 1 = -x. This step is so large that the expansion at
alpha = 1 is only a rough approximation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from isingcut.energies._quadratic import CurvatureEnergy

__all__ = ["Hessian"]


@dataclass(frozen=True)
class Hessian(CurvatureEnergy):
    """The exact second-order energy of the NLL, in nats per token.

    Complexity: about 2 N forward passes; more if the head is large.
    """

    kind: ClassVar[str] = "hessian"
    loss: ClassVar[str] = "mean token NLL"
