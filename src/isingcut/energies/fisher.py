"""`fisher`: the curvature of KL(original || gated), from labels sampled from the model.

The KL to the original and its gradient are zero at the original model. Its Hessian with respect
to the gates is the Fisher matrix

    F = mean over tokens of E_{y ~ p} [grad log p(y) grad log p(y)^T]

and E(x) = x^T F x / 2. One label is sampled for every position. Given the text, the gradients of
different positions are then independent with mean zero. So with a_s the gradient of sample s's
mean token NLL over T_s tokens, E[a_s a_s^T] is the sample's mean F divided by T_s:

    F = sum_s T_s^2 a_s a_s^T / sum_s T_s       (unbiased)

Unlike the empirical Fisher matrix, which takes its labels from the text, it has no part that comes
from the model's prediction error (Kunstner, Balles, Hennig, arXiv 1905.12558).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from isingcut.data.tokens import TokenSet
from isingcut.energies.base import Price, describe_energy, quadratic
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.measure.gradients import gate_gradients
from isingcut.measure.work import Work
from isingcut.models.replay import Replay

__all__ = ["Fisher"]


@dataclass(frozen=True)
class Fisher:
    """The sampled Fisher energy, in nats per token.

    Attributes:
        gate: ``"sublayer"`` or ``"block"``.
        seed: random seed of the sampled labels.
    """

    default_samples: ClassVar[int] = 256

    gate: str = "sublayer"
    seed: int = 0

    def measure(self, replay: Replay, tokens: TokenSet, work: Work) -> Hamiltonian:
        """Sample labels, compute the gate gradients and form the energy.

        Returns:
            Hamiltonian; unit ``"nats/token"``, with standard errors over samples.

        Complexity: about 2 to 2.5 forward passes.
        """
        rows = gate_gradients(
            replay, tokens, work, gate=self.gate, label_seed=self.seed
        )
        sums = rows * tokens.counts[:, None]
        options = {"gate": self.gate, "label_seed": self.seed}
        meta = describe_energy("fisher", "KL(original || gated)", tokens, **options)
        outer = sums[:, :, None] * sums[:, None, :]
        return quadratic(np.zeros_like(sums), outer, tokens.counts, meta)

    def price(self, n: int, sizes: Sequence[int]) -> Price:
        """Return what the energy computes, whatever the model."""
        return Price(2.5, 2.5, gradients=True)
