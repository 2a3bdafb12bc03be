"""Losses of states on growing numbers of samples, each sample of a state measured once.

The samples are put in one random order, and every state is measured on the first n of it: two
states that were measured on the same n are compared pairwise, on the very same text. A later
call with a larger n pays for the further samples only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from isingcut.data.calibration import TokenSet
from isingcut.energies.search.slopes import PASSES, gate_slopes
from isingcut.files import fingerprint
from isingcut.ising.states import Bools, Floats, States
from isingcut.measure.losses import measure
from isingcut.measure.pieces import tree_nodes
from isingcut.measure.sharing import Rows
from isingcut.measure.streams import block_means, influence
from isingcut.measure.work import Work
from isingcut.models.replay import Replay


@dataclass
class Known:
    """What is known of one state.

    Attributes:
        state: (N,) bool.
        sums: (m,) KL summed over a sample's tokens, in the evaluator's order; NaN from ``n`` on.
        n: samples measured.
    """

    state: Bools
    sums: Floats
    n: int = 0


class Evaluator:
    """KL(original || cut) of states, nats per token, and its price.

    Args:
        replay: the model's blocks.
        tokens: m samples.
        work: how to measure; its journal keeps every finished call.
        seed: of the order of the samples.

    Attributes:
        order: (m,) the samples of ``tokens`` in the order they are used.
        counts: (m,) predicted tokens of each, in that order.
        runs: block evaluations per token of the whole set, so far.
        heads: output heads over the whole set, so far.
        evaluations: states measured, each counted once.
        budget: passes that may be spent, for the progress shown; None where that is not known.
    """

    def __init__(self, replay: Replay, tokens: TokenSet, work: Work, seed: int) -> None:
        self._replay, self._work = replay, work
        rng = np.random.default_rng([seed, 0x0DE2])
        self.order = rng.permutation(tokens.samples)
        self._tokens = tokens.select([int(i) for i in self.order])
        self.counts = self._tokens.predicted.sum(1).numpy().astype(np.int64)
        self._real = self._tokens.mask.sum(1).numpy().astype(np.float64)
        self._known: dict[bytes, Known] = {}
        identity = {
            **replay.identity(),
            "tokens": self._tokens.input_ids.tolist(),
            "mask": self._tokens.mask.tolist(),
            "batch_tokens": work.batch_tokens,
        }
        self._kept = Rows(work.journal, fingerprint(identity), self._fits, replay.processes)
        self._referenced = 0
        self._sloped: set[str] = set()
        self.runs = self.heads = 0.0
        self.evaluations = 0
        self.budget: float | None = None

    @property
    def m(self) -> int:
        """Number of samples."""
        return len(self.counts)

    @property
    def blocks(self) -> int:
        """Number of blocks N."""
        return len(self._replay)

    @property
    def passes(self) -> float:
        """Full forward passes over the whole set, so far; shared prefixes are paid for once."""
        return self.runs / self.blocks

    def share(self, start: int, stop: int) -> float:
        """Share of the set's tokens in samples ``start`` to ``stop`` of the order."""
        return float(self._real[start:stop].sum() / self._real.sum())

    def known(self) -> list[Known]:
        """All states measured so far, in the order they came."""
        return list(self._known.values())

    def get(self, state: Bools) -> Known | None:
        """What is known of a state, if anything."""
        return self._known.get(state.tobytes())

    def measure(self, states: States | Sequence[Bools], n: int, description: str) -> None:
        """Bring states (S, N) to at least ``n`` samples each."""
        groups: dict[int, dict[bytes, Bools]] = {}
        for state in np.asarray(states, dtype=bool).reshape(-1, self.blocks):
            key = state.tobytes()
            have = self._known[key].n if key in self._known else 0
            if have < n:
                groups.setdefault(have, {})[key] = state
        for have, group in sorted(groups.items()):
            self._extend(list(group.values()), have, n, description)

    def slopes(self, state: Bools, n: int) -> Floats:
        """(N,) slopes of the KL in every gate at ``state``, on the first ``n`` samples."""
        key = f"slopes:{_key(state, 0, n)}"
        row = self._kept.get(key)
        if row is None:
            few = self._tokens.select(range(n))
            row = gate_slopes(self._replay, few, state, self._work.batch_tokens)
            self._kept.put(key, row)
        if key not in self._sloped:
            self._sloped.add(key)
            self.runs += PASSES * self.blocks * self.share(0, n)
            self.heads += PASSES * self.share(0, n)
        return row

    def influence(self, n: int) -> Floats:
        """(N,) block influence, 1 - mean cosine of the stream before and after each block."""
        key = f"influence:{n}"
        row = self._kept.get(key)
        if row is None:
            few = self._tokens.select(range(n))
            row = block_means(self._replay, few, Work(self._work.batch_tokens), influence)
            self._kept.put(key, row)
        self.runs += self.blocks * self.share(0, n)
        return row

    def price(self, states: States, n: int) -> float:
        """Passes that measuring the states on their first ``n`` samples would take, at most.

        With the original's own pass over samples that nothing was measured on yet.
        """
        own = self.share(self._referenced, n) if n > self._referenced else 0.0
        return own + tree_nodes(np.asarray(states, dtype=bool)) * self.share(0, n) / self.blocks

    def _fits(self, key: str, row: Floats) -> bool:
        """Whether a journal's row can be one of this search's."""
        if key.startswith(("slopes:", "influence:")):
            return row.shape == (self.blocks,)
        have, n = map(int, key.split(":")[1:])
        return 0 <= have < n <= self.m and row.shape == (n - have,)

    def _extend(self, states: list[Bools], have: int, n: int, description: str) -> None:
        if self.budget is not None:
            description += f" [{100 * min(1.0, self.passes / self.budget):.0f} % of the effort]"
        part = self.share(have, n)
        self.runs += tree_nodes(np.array(states)) * part
        self.heads += len(states) * part
        if n > self._referenced:
            new = self.share(self._referenced, n)
            self.runs += self.blocks * new
            self.heads += new
            self._referenced = n
        missing = [s for s in states if self._kept.get(_key(s, have, n)) is None]
        if missing:
            found = measure(
                self._replay,
                self._tokens.select(range(have, n)),
                np.array(missing),
                batch_tokens=self._work.batch_tokens,
                progress=self._work.progress,
                description=description,
            )
            for state, sums in zip(missing, found.kl_sums, strict=True):
                self._kept.put(_key(state, have, n), sums)
        for state in states:
            row = self._kept.get(_key(state, have, n))
            assert row is not None
            entry = self._known.get(state.tobytes())
            if entry is None:
                entry = Known(state.copy(), np.full(self.m, np.nan))
                self._known[state.tobytes()] = entry
                self.evaluations += 1
            entry.sums[have:n] = row
            entry.n = n


def _key(state: Bools, have: int, n: int) -> str:
    return f"{np.packbits(state).tobytes().hex()}:{have}:{n}"
