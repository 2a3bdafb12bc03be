"""Losses of states for a search, each measured once and paid for once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from isingcut.data.calibration import TokenSet
from isingcut.errors import InputError
from isingcut.files import fingerprint
from isingcut.ising.states import Bools, Floats, States
from isingcut.measure.losses import measure
from isingcut.measure.pieces import tree_nodes
from isingcut.measure.sharing import Rows
from isingcut.measure.work import Work
from isingcut.models.replay import Replay

LOSSES = ("kl", "nll")


class Ledger:
    """Measured losses and their price.

    One pass of the original over all tokens is paid for: the KL needs its distribution, and
    every state shares its hidden states up to the first removed block. The states of one call
    share prefixes among themselves too, and a state is paid for once on the same rows. What a
    call repeats of the original only because hidden states are not kept between calls is not
    charged. Finished calls are kept in the journal; what is read back from it costs the same as
    if measured.

    Args:
        loss: ``"kl"`` (to the original model) or ``"nll"``.

    Attributes:
        runs: block evaluations per token of the whole set, so far.
        heads: output heads, in the same unit.
        evaluations: states measured, whatever their number of rows.
    """

    def __init__(self, replay: Replay, tokens: TokenSet, work: Work, loss: str) -> None:
        if loss not in LOSSES:
            raise InputError(f"loss must be one of {', '.join(LOSSES)}; got {loss!r}")
        self._replay, self._tokens, self._work, self._loss = replay, tokens, work, loss
        identity = {
            **replay.identity(),
            "tokens": tokens.input_ids.tolist(),
            "mask": tokens.mask.tolist(),
            "loss": loss,
            "batch_tokens": work.batch_tokens,
        }
        self._kept = Rows(
            work.journal,
            fingerprint(identity),
            lambda key, row: row.shape == (1,),
            replay.processes,
        )
        self._paid: set[str] = set()
        self.runs = float(len(replay))
        self.heads = 1.0 if loss == "kl" else 0.0
        self.evaluations = 0

    @property
    def passes(self) -> float:
        """Full forward passes over the whole set, so far."""
        return self.runs / len(self._replay)

    def losses(
        self, states: States, rows: Sequence[int] | None = None, description: str = "searching"
    ) -> Floats:
        """Mean loss per token of states (S, N), on all samples or on the given rows: (S,)."""
        subset = list(range(self._tokens.samples)) if rows is None else sorted(rows)
        tokens = self._tokens.select(subset)
        keys = [_key(state, subset) for state in states]
        unpaid = {k: s for k, s in zip(keys, states, strict=True) if k not in self._paid}
        if unpaid:
            share = int(tokens.mask.sum()) / int(self._tokens.mask.sum())
            self.runs += tree_nodes(np.array(list(unpaid.values()))) * share
            self.heads += len(unpaid) * share
            self.evaluations += len(unpaid)
            self._paid |= set(unpaid)
        missing = {k: s for k, s in unpaid.items() if self._kept.get(k) is None}
        if missing:
            found = measure(
                self._replay,
                tokens,
                np.array(list(missing.values())),
                batch_tokens=self._work.batch_tokens,
                progress=self._work.progress,
                description=f"{description}: {len(missing)} states",
            )
            values = found.kl if self._loss == "kl" else found.nll
            for key, value in zip(missing, values, strict=True):
                self._kept.put(key, np.array([value]))
        return np.array([self._value(key) for key in keys])

    def _value(self, key: str) -> float:
        row = self._kept.get(key)
        assert row is not None
        return float(row[0])


def _key(state: Bools, rows: Sequence[int]) -> str:
    digest = hashlib.sha256(np.array(rows, dtype=np.int64).tobytes()).hexdigest()[:16]
    return f"{np.packbits(state).tobytes().hex()}:{digest}"
