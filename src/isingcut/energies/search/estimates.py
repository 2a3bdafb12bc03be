"""One scale for losses measured on different numbers of samples.

The loss of a state on the first n samples is extrapolated to all m samples by the mean change of
the states measured on both. The spread of that change over states is the error of the estimate. So
states measured on two samples and on all samples can be ranked together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from isingcut.energies.search.evaluator import Evaluator, Known
from isingcut.ising.states import Floats

PRIOR_SPREAD = 0.06
"""Assumed relative change between rungs, until enough states were measured on both."""
LEAST = 1e-12
"""Smallest loss in nats per token; below it there is only rounding."""


class Estimates:
    """Estimated loss on all samples of every state near a target's size.

    Args:
        evaluator: the measurements.
        known: the states to estimate, each measured on at least one rung.
        rungs: numbers of samples, ascending; the last is all samples.

    Attributes:
        states: (S, N) bool.
        loss: (S,) estimated KL on all samples, nats per token.
        sd: (S,) its standard deviation, without the part common to all states.
        rung: (S,) index of the highest rung of each state.
    """

    def __init__(self, evaluator: Evaluator, known: Sequence[Known], rungs: Sequence[int]) -> None:
        cumulative = np.cumsum(evaluator.ledger.counts)
        n = np.array([k.n for k in known])
        sums = np.array([np.nancumsum(k.sums) for k in known]).reshape(len(known), evaluator.m)
        self.states = np.array([k.state for k in known], dtype=bool)
        self.rung = np.array([sum(r <= v for r in rungs) - 1 for v in n], dtype=int)
        means = np.stack([sums[:, r - 1] / cumulative[r - 1] for r in rungs], axis=1)
        means = np.maximum(means, LEAST)
        log_shift, variance = np.zeros(len(rungs)), np.zeros(len(rungs))
        for level in range(len(rungs) - 2, -1, -1):
            both = self.rung > level
            change = np.log(means[both, level + 1] / means[both, level])
            shift = float(change.mean()) if len(change) else 0.0
            # Four pseudo-states with the prior spread, because two similar states prove little.
            spread = ((change - shift) ** 2).sum() + 4 * PRIOR_SPREAD**2
            log_shift[level] = log_shift[level + 1] + shift
            variance[level] = variance[level + 1] + spread / (len(change) + 4)
        own = means[np.arange(len(known)), self.rung]
        self.loss: Floats = own * np.exp(log_shift[self.rung])
        self.sd: Floats = self.loss * np.sqrt(variance[self.rung])

    def best(self) -> int:
        """The index of the best state among those on the highest rung."""
        top = self.rung == self.rung.max()
        return int(np.flatnonzero(top)[np.argmin(self.loss[top])])
