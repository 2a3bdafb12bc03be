"""`cbo`: block removal as constrained binary optimisation, the method that isingcut builds on.

The empirical Fisher matrix of the sublayer gates is the energy (see
`isingcut.energies.empirical_fisher`), minimised under exactly M removals. `top=1` takes the
ground state as published; `top=K` measures the K lowest states and takes the best, as the paper
finds that the best model is often an excited state.

Source: Jansen et al., arXiv 2602.00161. Its authors use 2,048 instruction samples and choose among
excited states by benchmark scores; this code uses the given tokens, and chooses by KL to the
original on the tokens that the energy was measured on.
"""

from dataclasses import dataclass, replace

import numpy as np

from isingcut.baselines.base import Outcome, open_ledger
from isingcut.data.tokens import TokenSet
from isingcut.energies.empirical_fisher import EmpiricalFisher
from isingcut.ising.constraints import count
from isingcut.ising.problem import Problem
from isingcut.ising.solvers import solve
from isingcut.measure.work import Work
from isingcut.models.replay import Replay

__all__ = ["Cbo"]

BACKWARD = 2.0
"""Cost of the backward pass in forward passes: the usual figure, parameter gradients included.

isingcut computes gradients of gates only, which is cheaper; this figure is the method's cost with
plain autograd.
"""


@dataclass(frozen=True)
class Cbo:
    """The paper's constrained binary optimisation.

    Attributes:
        top: number of lowest states to measure; 1 takes the ground state without measuring it.
    """

    top: int = 1

    def choose(
        self, replay: Replay, tokens: TokenSet, remove: int, work: Work, seed: int
    ) -> Outcome:
        """Choose the ground state, or the best of the ``top`` lowest; ``seed`` is the solver's.

        Raises:
            InputError: impossible number of states.
            ArchitectureError: no sublayer gate acts on some block.
        """
        n = len(replay)
        # A journal belongs to one measurement, and the ledger uses the caller's.
        rows = work.journal and work.journal.with_name(f"gradients-{work.journal.name}")
        energy = EmpiricalFisher().measure(replay, tokens, replace(work, journal=rows))
        spectrum = solve(Problem(energy, [count(n, remove)]), k=self.top, seed=seed)
        # The ledger already counts the gradient's forward pass, which is that of the original.
        ledger = open_ledger(replay, tokens, work, "kl")
        info = {
            "energies": spectrum.energies.tolist(),
            "states": [spectrum.removed(k) for k in range(len(spectrum))],
            "proven": spectrum.proven,
            "counted": "gradients: one forward pass and a backward pass that counts as two",
        }
        chosen = 0
        if self.top > 1:
            losses = ledger.losses(spectrum.states, description="lowest states")
            chosen = int(np.argmin(losses))
            info["kl"] = losses.tolist()
        info["position"] = chosen
        return Outcome(
            tuple(spectrum.removed(chosen)),
            ledger.passes + BACKWARD,
            ledger.heads + BACKWARD,
            info,
        )
