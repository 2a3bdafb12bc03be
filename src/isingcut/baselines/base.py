"""The interface of baselines: published methods that choose blocks from a model and text.

A baseline is a frozen dataclass whose fields are its options. Its method `choose(replay, tokens,
remove, work, seed)` returns an `Outcome`, deterministic for a seed.
"""

from dataclasses import dataclass, field
from typing import Any

from isingcut.data.tokens import TokenSet
from isingcut.measure.ledger import Ledger
from isingcut.measure.work import Work
from isingcut.models.replay import Replay


@dataclass(frozen=True)
class Outcome:
    """The choice of a baseline, and its cost.

    Attributes:
        removed: removed blocks, ascending.
        passes: cost in full forward passes over the given tokens: block evaluations per token,
            divided by N. Shared work counts once for every method: the original runs once and its
            hidden states at all boundaries are kept, so that a state costs nothing before its
            first removed block; states measured together share their other prefixes too.
        heads: output heads evaluated, in the same unit (one per state over all tokens).
        info: figures that explain the choice, serialisable as JSON.
    """

    removed: tuple[int, ...]
    passes: float
    heads: float = 0.0
    info: dict[str, Any] = field(default_factory=dict)


def open_ledger(replay: Replay, tokens: TokenSet, work: Work, loss: str) -> Ledger:
    """Open a ledger that already counts one pass of the original.

    The KL needs the original's distribution, and every state its hidden states up to the first
    removed block.

    Raises:
        InputError: ``loss`` is neither ``"kl"`` nor ``"nll"``.
    """
    ledger = Ledger(replay, tokens, work, loss)
    ledger.pay("original", len(replay), float(loss == "kl"))
    return ledger
