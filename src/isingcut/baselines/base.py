"""What a baseline is: another method's way from a model and text to the blocks to remove.

A part is a frozen dataclass: its fields are its options, and `choose(replay, tokens, remove, work,
seed)` returns an `Outcome`, deterministic for a seed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from isingcut.data.calibration import TokenSet
from isingcut.errors import InputError
from isingcut.measure.ledger import Ledger
from isingcut.measure.work import Work
from isingcut.models.replay import Replay


@dataclass(frozen=True)
class Outcome:
    """What a baseline chose, and what it paid.

    Attributes:
        removed: block indices, ascending.
        passes: cost in full forward passes over the given tokens, counted in blocks: block
            evaluations per token, over N. Every method is credited with the same sharing: the
            original runs once and its hidden states at all boundaries are kept, so that a state
            costs nothing before its first removed block; states measured together share their
            other prefixes too.
        heads: output heads evaluated, in the same unit (one per state over all tokens).
        info: what the method based its choice on; JSON-able.
    """

    removed: tuple[int, ...]
    passes: float
    heads: float
    info: dict[str, Any] = field(default_factory=dict)


def open_ledger(replay: Replay, tokens: TokenSet, work: Work, loss: str) -> Ledger:
    """A ledger on which the original's own pass is paid for.

    The KL needs its distribution, and every state its hidden states up to the first removed block.

    Raises:
        InputError: a loss that is neither ``"kl"`` nor ``"nll"``.
    """
    ledger = Ledger(replay, tokens, work, loss)
    ledger.pay("original", len(replay), 1.0 if loss == "kl" else 0.0)
    return ledger


def check_count(replay: Replay, remove: int, *, kept: int = 0) -> None:
    """Refuse a number of removals that the model's blocks do not allow.

    Args:
        kept: blocks the method never removes.

    Raises:
        InputError: fewer than one removal, or more than there are blocks to remove.
    """
    most = len(replay) - max(1, kept)
    if not 1 <= remove <= most:
        raise InputError(
            f"cannot remove {remove} of {len(replay)} blocks; expected 1 to {most} with this method"
        )
