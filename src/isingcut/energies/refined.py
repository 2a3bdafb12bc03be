"""`refined`: a search near the requested removals within a budget, and its final energy.

The Hamiltonian is the posterior mean of `isingcut.energies.search`: the pair energy, corrected by
every state measured near the requested sizes. The best states of the search are stored in
``meta["search"]``, and are ranked together with the low states of the Hamiltonian.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from isingcut.data.tokens import TokenSet
from isingcut.energies.base import Price, describe_energy, price_states
from isingcut.energies.pairwise import list_removals
from isingcut.energies.search import Search, Target, default_passes
from isingcut.energies.search.proposals import one_pass_states
from isingcut.errors import InputError
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.states import blocks_of
from isingcut.measure.losses import measure
from isingcut.measure.work import Work
from isingcut.models.replay import Replay
from isingcut.options.parsed import Effort

__all__ = ["Refined"]

KEPT = 10
"""Number of finalists to store for each removal."""


@dataclass(frozen=True)
class Refined:
    """The energy that results from a search.

    Attributes:
        targets: removals to search for; a run takes them from its options.
        effort: limit of the search: ``"150"`` forward passes over the calibration text,
            ``"20min"``, or empty for `isingcut.energies.search.default_passes`.
        seed: random seed.
    """

    default_samples: ClassVar[int] = 16

    targets: tuple[Target, ...] = ()
    effort: str = ""
    seed: int = 0

    def measure(self, replay: Replay, tokens: TokenSet, work: Work) -> Hamiltonian:
        """Search, and return the posterior energy with the best states in its metadata.

        Raises:
            InputError: there are no targets, or ``effort`` cannot be parsed.
        """
        if not self.targets:
            raise InputError(
                "the energy 'refined' needs a removal to search near; add --remove or --budget, or "
                "use --energy pairwise, which works for any removal"
            )
        effort = Effort(self.effort)

        def count_passes() -> float:
            return (effort.seconds or 0.0) / seconds_per_pass(replay, tokens, work)

        passes = count_passes if effort.seconds else effort.passes
        search = Search(replay, tokens, work, self.targets, passes, self.seed).run()
        meta = describe_energy("refined", "KL(original || cut)", tokens)
        return replace(search.energy(), meta=meta | {"search": summary(search)})

    def price(self, n: int, sizes: Sequence[int]) -> Price:
        """Return what a search for ``sizes`` of ``n`` blocks computes, or the limit of its time.

        Its states have about as many heads for each pass as the pairs. On average, a search ends
        after half of its default budget.
        """
        effort = Effort(self.effort)
        targets = [Target.count(n, size) for size in sizes]
        passes = effort.passes or default_passes(n, targets) / 2
        pairs = price_states(list_removals(n))
        return Price(
            passes, passes * pairs.heads / pairs.passes, seconds=effort.seconds
        )


def seconds_per_pass(replay: Replay, tokens: TokenSet, work: Work) -> float:
    """Estimate the time of one pass over ``tokens`` from the faster of two timed micro-batches."""
    batch = tokens.batches(work.batch_tokens)[0]
    taken = []
    for _ in range(2):
        began = time.perf_counter()
        measure(replay, batch, [], Work(work.batch_tokens))
        taken.append(time.perf_counter() - began)
    return min(taken) * int(tokens.mask.sum()) / int(batch.mask.sum())


def summary(search: Search) -> dict[str, Any]:
    """Return the JSON-able results of a search: the cost, and each target's finalists and trace."""
    targets: dict[str, Any] = {}
    for goal in search.goals:
        known = search.estimates(goal.target.feasible)
        assert known is not None
        quick = one_pass_states(search.evaluator, goal.target, search.one_pass)
        # States with the most samples come first, because their losses are the most certain.
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
            "one_pass": [
                {"method": m, "removed": blocks_of(x)} for m, x in quick.items()
            ],
            "states": len(known.states),
            "all_states": goal.exhausted,
            "trace": goal.trace,
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
