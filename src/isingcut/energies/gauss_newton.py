"""`gauss-newton`: the exact curvature of KL(original || gated) at the original model.

    E(x) = x^T F x / 2,   F = mean over tokens of J^T (diag(p) - p p^T) J

with J the derivative of the logits with respect to the gates. `fisher` estimates F from sampled
labels. The gradient of the KL is zero at the original model, so there is no linear term.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from isingcut.energies._quadratic import CurvatureEnergy

__all__ = ["GaussNewton"]


@dataclass(frozen=True)
class GaussNewton(CurvatureEnergy):
    """The exact second-order energy of the KL, in nats per token.

    Complexity: about N forward passes; more if the head is large.
    """

    kind: ClassVar[str] = "gauss-newton"
    loss: ClassVar[str] = "KL(original || gated)"
