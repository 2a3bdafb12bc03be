"""Losses of states on growing numbers of samples; each sample of a state is measured once.

The samples are in one random order, and every state is measured on the first n of them. So two
states with the same n are compared on the same text. A later call with a larger n measures only the
additional samples.

The loss of a state on the first n samples is extrapolated to all m samples by the mean change of
the states measured on both. The spread of that change over states is the error of the estimate. So
states measured on two samples and on all samples can be ranked together.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from isingcut.data.tokens import TokenSet
from isingcut.ising.states import Bools, Floats, States, key_of
from isingcut.measure.gradients import GATE_SLOPES_PASSES, gate_slopes
from isingcut.measure.ledger import Ledger
from isingcut.measure.losses import tree_nodes
from isingcut.measure.streams import one_pass
from isingcut.measure.work import Work
from isingcut.models.replay import Replay


@dataclass
class StateLosses:
    """The measurements of one state.

    Attributes:
        state: (N,) bool.
        sums: (m,) KL summed over each sample's tokens, in `Evaluator.order`; NaN from ``n`` on.
        n: number of measured samples.
    """

    state: Bools
    sums: Floats
    n: int = 0


class Evaluator:
    """Measurements of KL(original || cut) of states, in nats per token, and their cost.

    Args:
        replay: the model's blocks.
        tokens: m samples.
        work: settings of the measurement; its journal keeps every finished call.
        seed: random seed of the sample order.

    Attributes:
        budget: limit in passes, for the progress display; None if unknown.
        order: (m,) indices of the samples of ``tokens``, in the order in which they are used.
        known: measured states by key, in the order of their measurement.
        ledger: cost so far, and number of predicted tokens of each sample in that order.
    """

    def __init__(
        self,
        replay: Replay,
        tokens: TokenSet,
        work: Work,
        seed: int,
    ) -> None:
        self._replay = replay
        self._batch_tokens = work.batch_tokens
        self.budget: float | None = None
        self.order = np.random.default_rng([seed, 0x0DE2]).permutation(tokens.samples)
        self._tokens = tokens.select(self.order.tolist())
        self.ledger = Ledger(replay, self._tokens, work)
        self.known: dict[str, StateLosses] = {}
        self._referenced = 0
        self._waiting: list[tuple[dict[str, Bools], int, int]] = []
        self._together = False
        self._owed = 0.0

    @property
    def m(self) -> int:
        """The number of samples."""
        return len(self.order)

    @property
    def blocks(self) -> int:
        """The number of blocks N."""
        return len(self._replay)

    def samples(self, state: Bools) -> int:
        """Return the number of samples that a state was measured on."""
        known = self.known.get(key_of(state))
        return known.n if known else 0

    @property
    def spent(self) -> float:
        """The number of passes spent so far, deferred measurements included."""
        return self.ledger.passes + self._owed

    def measure(
        self, states: States | Sequence[Bools], n: int, description: str
    ) -> None:
        """Measure states (S, N) on at least ``n`` samples each."""
        groups: dict[int, dict[str, Bools]] = {}
        for state in np.asarray(states, dtype=bool).reshape(-1, self.blocks):
            if (have := self.samples(state)) < n:
                groups.setdefault(have, {})[key_of(state)] = state
        self._waiting += [(group, have, n) for have, group in sorted(groups.items())]
        if not self._together:
            self._extend(description)
        elif groups:
            self._owed += self.price(states, n)

    @contextmanager
    def together(self, description: str) -> Iterator[None]:
        """Defer measurements of a streamed model within the context, to share one sweep.

        Measurements of a model in memory are not deferred, so that later ones can depend on them.
        """
        self._together = self._replay.streamed
        yield
        self._together = False
        self._owed = 0.0
        self._extend(description)

    def _extend(self, description: str) -> None:
        """Measure the deferred states, each on the samples that are still missing."""
        waiting = self._waiting
        self._waiting = []
        calls = [waiting] if self._replay.streamed else [[one] for one in waiting]
        for call in filter(None, calls):
            title = description
            if self.budget is not None:
                spent = 100 * min(1.0, self.ledger.passes / self.budget)
                title += f" [{spent:.0f} % of the effort]"
            wanted = [
                (np.array(list(group.values())), range(have, n))
                for group, have, n in call
            ]
            measured = self.ledger.sums(wanted, title)
            for (group, have, n), sums in zip(call, measured, strict=True):
                new = self.ledger.share(range(self._referenced, n))
                self.ledger.pay(f"original:{n}", self.blocks * new, new)
                self._referenced = max(self._referenced, n)
                for (key, state), row in zip(group.items(), sums, strict=True):
                    unknown = StateLosses(state.copy(), np.full(self.m, np.nan))
                    entry = self.known.setdefault(key, unknown)
                    entry.sums[have:n] = row
                    entry.n = n

    def slopes(self, state: Bools, n: int) -> Floats:
        """Return (N,) slopes of the KL, see `gate_slopes`, at ``state`` on the first n samples."""
        price = GATE_SLOPES_PASSES * self.ledger.share(range(n))

        def make() -> Floats:
            few = self._tokens.select(range(n))
            return gate_slopes(self._replay, few, state, self._batch_tokens)

        key = f"slopes:{key_of(state)}:{n}"
        return self.ledger.measure_once(key, self.blocks * price, price, make)

    def one_pass(self, n: int) -> tuple[Floats, Floats]:
        """Return (N,) block influence and (N + 1, N + 1) angles, see `streams.one_pass`."""
        boundaries = self.blocks + 1

        def make() -> Floats:
            few = self._tokens.select(range(n))
            measured = one_pass(self._replay, few, Work(self._batch_tokens))
            return np.concatenate([part.ravel() for part in measured])

        runs = self.blocks * self.ledger.share(range(n))
        row = self.ledger.measure_once(f"one-pass:{n}", runs, 0.0, make)
        return row[: self.blocks], row[self.blocks :].reshape(boundaries, boundaries)

    def price(self, states: States | Sequence[Bools], n: int) -> float:
        """Return an upper bound on the passes to measure the states on the first ``n`` samples.

        Includes the original model's pass over samples on which no state was measured yet.
        """
        own = self.ledger.share(range(self._referenced, n))
        nodes = tree_nodes(np.asarray(states, dtype=bool))
        return own + nodes * self.ledger.share(range(n)) / self.blocks


PRIOR_SPREAD = 0.06
"""Assumed relative change between rungs, until enough states were measured on both."""
LEAST = 1e-12
"""Smallest loss in nats per token; anything below it is rounding."""


class Estimates:
    """Estimated losses of states on all samples.

    Args:
        evaluator: the measurements.
        known: states to estimate, each measured on at least one rung.
        rungs: numbers of samples, ascending; the last is all samples.

    Attributes:
        states: (S, N) bool.
        loss: (S,) estimated KL on all samples, nats per token.
        sd: (S,) standard deviation of ``loss``, without the part common to all states.
        rung: (S,) index of the highest rung of each state.
    """

    def __init__(
        self, evaluator: Evaluator, known: Sequence[StateLosses], rungs: Sequence[int]
    ) -> None:
        cumulative = np.cumsum(evaluator.ledger.counts)
        sums = np.array([np.nancumsum(k.sums) for k in known]).reshape(
            len(known), evaluator.m
        )
        self.states = np.array([k.state for k in known], dtype=bool)
        self.rung = np.searchsorted(rungs, [k.n for k in known], side="right") - 1
        means = np.stack([sums[:, r - 1] / cumulative[r - 1] for r in rungs], axis=1)
        means = np.maximum(means, LEAST)
        log_shift = np.zeros(len(rungs))
        variance = np.zeros(len(rungs))
        for level in range(len(rungs) - 2, -1, -1):
            both = self.rung > level
            change = np.log(means[both, level + 1] / means[both, level])
            shift = float(change.mean()) if len(change) else 0.0
            # Add four pseudo-states with the prior spread: two similar states are weak evidence.
            spread = ((change - shift) ** 2).sum() + 4 * PRIOR_SPREAD**2
            log_shift[level] = log_shift[level + 1] + shift
            variance[level] = variance[level + 1] + spread / (len(change) + 4)
        own = means[np.arange(len(known)), self.rung]
        self.loss: Floats = own * np.exp(log_shift[self.rung])
        self.sd: Floats = self.loss * np.sqrt(variance[self.rung])

    def best(self) -> int:
        """Return the index of the best state among those on the highest rung."""
        top = self.rung == self.rung.max()
        return int(np.flatnonzero(top)[np.argmin(self.loss[top])])
