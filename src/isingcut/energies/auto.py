"""`auto`: the best plan for the effort allowed, from block influence to every state.

With a removal in view it is `refined`, whose search fits itself to the budget: block influence
where one pass is all there is, single removals, the pairs a good state may hold, all pairs on
more text, and every state where they are few. Without one it is `pairwise`, which answers
every removal.
"""

from __future__ import annotations

from dataclasses import dataclass

from isingcut.data.calibration import TokenSet
from isingcut.energies.pairwise import Pairwise
from isingcut.energies.refined import Refined
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.measure.work import Work
from isingcut.models.replay import Replay

__all__ = ["Auto"]


@dataclass(frozen=True)
class Auto(Refined):
    """`refined` near the wanted removals, `pairwise` where none is given."""

    def measure(self, replay: Replay, tokens: TokenSet, work: Work) -> Hamiltonian:
        """The energy of the plan that fits."""
        if not self.targets:
            return Pairwise().measure(replay, tokens, work)
        return super().measure(replay, tokens, work)
