"""`pairwise`: own terms and couplings measured by removing one and two blocks.

    D(x)  = mean KL(original || blocks x removed), nats per token
    h_i   = D({i})
    J_ij  = D({i, j}) - D({i}) - D({j})

so that the energy is exact for every state with at most two removed blocks. The N (N + 1) / 2
states share their prefixes, which saves about two thirds of the block evaluations.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

import numpy as np

from isingcut.data.tokens import TokenSet
from isingcut.energies.base import Price, describe_energy, join_samples, price_states
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.states import States, states_of
from isingcut.measure.losses import measure
from isingcut.measure.work import Work
from isingcut.models.replay import Replay

__all__ = ["Pairwise"]


@dataclass(frozen=True)
class Pairwise:
    """The measured pair energy, in nats per token, with standard errors over samples."""

    default_samples: ClassVar[int] = 16

    def measure(self, replay: Replay, tokens: TokenSet, work: Work) -> Hamiltonian:
        """Measure D for every block and every pair.

        Returns:
            Hamiltonian with c = 0, unit ``"nats/token"`` and, for two samples or more,
            ``h_error`` and ``J_error``.

        Complexity: about N^3 / 6 block evaluations per sample, plus N (N + 1) / 2 output heads.
        """
        n = len(replay)
        states = list_removals(n)
        title = f"measuring {len(states)} removals"
        losses = measure(replay, tokens, states, work, title)
        own = losses.kl_sums[:n]  # (N, m)
        i, j = np.triu_indices(n, 1)
        coupled = np.zeros((tokens.samples, n, n))
        coupled[:, i, j] = coupled[:, j, i] = (losses.kl_sums[n:] - own[i] - own[j]).T
        meta = describe_energy("pairwise", "KL(original || cut)", tokens)
        meta["blocks_run"] = losses.blocks_run
        return join_samples(own.T, coupled, losses.counts, meta)

    def price(self, n: int, sizes: Sequence[int]) -> Price:
        """Return what the energy of ``n`` blocks computes."""
        return price_states(list_removals(n))


def list_removals(n: int) -> States:
    """Make (n (n + 1) / 2, n) states: every single removal, then every pair, in ascending order."""
    return states_of(n, [*combinations(range(n), 1), *combinations(range(n), 2)])
