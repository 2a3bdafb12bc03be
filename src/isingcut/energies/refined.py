"""`refined`: the budgeted search near the wanted removals, and the energy it ends with.

The Hamiltonian is the posterior mean of `isingcut.energies.search`: the pair energy corrected by
every state that was measured near the wanted sizes. What the search found for each removal is kept
beside it, in ``meta["search"]``, and goes into the ranking with the Hamiltonian's own low
states.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from isingcut.data.calibration import TokenSet
from isingcut.energies.search import Search, Target
from isingcut.energies.search.proposals import one_pass_states
from isingcut.errors import InputError
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.states import blocks_of
from isingcut.measure.losses import measure
from isingcut.measure.work import Work
from isingcut.models.replay import Replay
from isingcut.options.spellings import Effort

__all__ = ["Refined"]

KEPT = 10
"""Finalists of each removal that are kept."""


@dataclass(frozen=True)
class Refined:
    """The search as an energy.

    Attributes:
        targets: the removals to search for; a run takes them from its options.
        effort: what to spend: ``"150"`` forward passes over the calibration text, ``"20min"``, or
            nothing for what a greedy path to the largest removal would cost.
        seed: of every random choice.
    """

    default_samples: ClassVar[int] = 16

    targets: tuple[Target, ...] = ()
    effort: str = ""
    seed: int = 0

    def measure(self, replay: Replay, tokens: TokenSet, work: Work) -> Hamiltonian:
        """Search, and return the posterior energy with what was found in its metadata.

        Raises:
            InputError: no removal to search near, or an effort that cannot be read.
        """
        if not self.targets:
            raise InputError(
                "the energy 'refined' searches near a removal; say which with --remove or "
                "--budget, or use --energy pairwise, which answers every removal"
            )
        effort = Effort(self.effort)

        def timed() -> float:
            return (effort.seconds or 0.0) / seconds_per_pass(replay, tokens, work)

        passes = timed if effort.seconds else effort.passes
        search = Search(replay, tokens, work, self.targets, passes, self.seed).run()
        meta = {
            "energy": "refined",
            "loss": "KL(original || cut)",
            "samples": tokens.samples,
            "tokens": tokens.tokens,
            "search": summary(search),
        }
        return replace(search.energy(), meta=meta)


def seconds_per_pass(replay: Replay, tokens: TokenSet, work: Work) -> float:
    """Time of one pass over ``tokens``, from the faster of two timed micro-batches."""
    batch = tokens.batches(work.batch_tokens)[0]
    taken = []
    for _ in range(2):
        began = time.perf_counter()
        measure(replay, batch, [], Work(work.batch_tokens))
        taken.append(time.perf_counter() - began)
    return min(taken) * int(tokens.mask.sum()) / int(batch.mask.sum())


def summary(search: Search) -> dict[str, Any]:
    """What a search found, JSON-able: the price, and each target's finalists and trace."""
    targets: dict[str, Any] = {}
    for goal in search.goals:
        known = search.estimates(goal.target)
        assert known is not None
        quick = one_pass_states(search.evaluator, goal.target, search.one_pass)
        # The states measured on most samples first: they are the ones to trust.
        order = np.lexsort((known.loss, -known.rung))[:KEPT]
        targets[goal.target.label] = {
            "finalists": [
                {
                    "removed": blocks_of(known.states[s]),
                    "kl": float(known.loss[s]),
                    "samples": search.rungs[int(known.rung[s])],
                }
                for s in order
            ],
            "one_pass": [{"method": m, "removed": blocks_of(x)} for m, x in quick.items()],
            "states": len(known.states),
            "all_states": goal.exhausted,
            "trace": [t for t in search.trace if t["remove"] == goal.target.label],
        }
    paid = search.evaluator.ledger
    counts = paid.counts
    return {
        "one_pass_passes": float(counts[: search.one_pass].sum() / counts.sum()),
        "budget_passes": search.budget,
        "passes": paid.passes,
        "heads": paid.heads,
        "evaluations": len(search.evaluator.known),
        "targets": targets,
    }
