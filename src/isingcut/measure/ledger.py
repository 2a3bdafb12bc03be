"""The measurements of a search and their cost; each is measured and charged once."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from isingcut.data.tokens import TokenSet
from isingcut.errors import InputError
from isingcut.ising.states import Bools, Floats, States, key_of
from isingcut.measure.losses import measure_together, tree_nodes
from isingcut.measure.work import SharedJournal, Work, identity
from isingcut.models.replay import Replay


class Ledger:
    """The measurements on one text and their cost.

    A state shares its hidden states with the original model up to its first removed block, and
    further ones with the states of the same call. Repeated forward passes of the original, needed
    only because hidden states are not kept between calls, are not charged. Finished calls are kept
    in the journal; rows read from it are charged as if measured.

    Args:
        tokens: m samples.
        work: settings of the measurement; its journal keeps every finished call.
        loss: ``"kl"`` (to the original model) or ``"nll"``.

    Attributes:
        counts: (m,) number of predicted tokens of each sample.
        runs: number of block evaluations so far, per token of the whole text.
        heads: number of output head evaluations so far, in the same unit.

    Raises:
        InputError: unknown loss.
    """

    def __init__(
        self, replay: Replay, tokens: TokenSet, work: Work, loss: str = "kl"
    ) -> None:
        if loss not in ("kl", "nll"):
            raise InputError(f"loss must be kl or nll; got {loss!r}")
        self._replay = replay
        self._tokens = tokens
        self._loss = loss
        # The ledger has its own journal.
        self._work = replace(work, journal=None)
        self.counts = tokens.counts
        self._real = tokens.mask.sum(1).numpy()
        measured = identity(replay, tokens, loss=loss, batch_tokens=work.batch_tokens)
        self._kept = SharedJournal(work.journal, measured, replay.processes)
        self._paid: set[str] = set()
        self.runs = self.heads = 0.0

    @property
    def passes(self) -> float:
        """The number of full forward passes over the whole text so far."""
        return self.runs / len(self._replay)

    def share(self, rows: Sequence[int]) -> float:
        """Return the share of the text's tokens that are in the given samples."""
        return float(self._real[list(rows)].sum() / self._real.sum())

    def pay(self, key: str, runs: float, heads: float) -> None:
        """Add the cost of ``key``, unless it was added before."""
        if key not in self._paid:
            self._paid.add(key)
            self.runs += runs
            self.heads += heads

    def measure_once(
        self,
        key: str,
        runs: float,
        heads: float,
        make: Callable[[], Floats],
    ) -> Floats:
        """Make and charge once a measurement (R,) other than losses, and return it.

        Every process uses the numbers of rank 0: a backward pass of attention is not always
        bitwise reproducible, and processes with different numbers would diverge.
        """
        self.pay(key, runs, heads)
        row = self._kept.get(key)
        if row is None:
            made = make().astype(np.float64).tobytes()
            first, *_ = self._replay.processes.gather(made)
            row = np.frombuffer(first, dtype=np.float64).copy()
            self._kept.put({key: row})
        return row

    def sums(
        self, wanted: Sequence[tuple[States, Sequence[int]]], description: str
    ) -> list[Floats]:
        """Return for each set of states (S, N) losses (S, R) on its samples, summed over tokens."""
        missing: list[tuple[dict[str, Bools], TokenSet]] = []
        keys: list[list[str]] = []
        for states, rows in wanted:
            samples = np.array(rows, dtype=np.int64).tobytes()
            named = hashlib.sha256(samples).hexdigest()[:16]
            keys.append([f"{key_of(state)}:{named}" for state in states])
            by_key = dict(zip(keys[-1], states, strict=True))
            unpaid = {k: state for k, state in by_key.items() if k not in self._paid}
            if unpaid:
                share = self.share(rows)
                self._paid |= unpaid.keys()
                self.runs += tree_nodes(np.array([*unpaid.values()])) * share
                self.heads += len(unpaid) * share
            absent = {k: s for k, s in unpaid.items() if self._kept.get(k) is None}
            if absent:
                missing.append((absent, self._tokens.select(rows)))
        if missing:
            sets = [(text, np.array([*new.values()])) for new, text in missing]
            measured = measure_together(self._replay, sets, self._work, description)
            for (absent, _), losses in zip(missing, measured, strict=True):
                sums = losses.kl_sums if self._loss == "kl" else losses.nll_sums
                self._kept.put(dict(zip(absent, sums, strict=True)))
        return [
            np.array([self._kept.get(key) for key in own]).reshape(len(own), len(rows))
            for own, (_, rows) in zip(keys, wanted, strict=True)
        ]

    def losses(self, states: States, description: str = "searching") -> Floats:
        """Return the mean loss per token (S,) of states (S, N) on the whole text."""
        wanted = [(states, range(len(self.counts)))]
        (sums,) = self.sums(wanted, f"{description}: {len(states)} states")
        return np.asarray(sums.sum(1) / self.counts.sum())
