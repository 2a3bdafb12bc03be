"""Text to fit a run's patch on: what its energy was measured on, and more of the source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from isingcut.data.encoder import Encoder
from isingcut.data.healing_text import opened
from isingcut.data.mixture import Turns, naming, parts_of, places_in
from isingcut.data.text_files import only_once
from isingcut.data.tokens import Row, TokenSet, counts
from isingcut.errors import IsingcutError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from isingcut.data.calibration import Calibration


@dataclass(frozen=True, eq=False)
class FittingText:
    """What a patch is fitted on.

    Attributes:
        tokens: samples of the calibration's length.
        searched: how many of them the energy was measured on; they come first.
        short: why there are fewer tokens than were asked for; empty where there are as many.
    """

    tokens: TokenSet
    searched: int
    short: str


def to_fit(
    used: Calibration,
    tokenizer: PreTrainedTokenizerBase,
    most: int,
    model: PreTrainedModel | None = None,
) -> FittingText:
    """About ``most`` tokens that neither rank nor report: of the energy's split, then unused ones.

    Args:
        used: a run's calibration; its source is read on where its energy split is too short.
        most: tokens, those without a prediction among them.
        model: its embedding bounds the token ids.
    """
    split, encode = used.splits["energy"], Encoder(tokenizer, model)
    held = split.mask.sum(1).cumsum(0)
    own = split.select(range(min(split.samples, int((held < most).sum()) + 1)))
    rows = own.rows
    missing, short = most - int(own.mask.sum()), ""
    places = places_in(used.source)
    if missing > 0 and "self" in places:
        short = "the model wrote no more"
    elif missing > 0 and any(map(only_once, places)):
        short = "a pipe is read once"
    elif missing > 0:
        try:
            for row in _further(used, encode):
                rows.append(row)
                missing -= len(row)
                if missing <= 0:
                    break
            else:
                short = "the source has no more"
        except IsingcutError as e:
            # It may be gone since: a file that was moved, texts that were handed over in Python.
            short = f"the source cannot be read on: {e}"
    return FittingText(TokenSet.from_rows(rows, encode.pad), own.samples, short)


def _further(used: Calibration, encode: Encoder) -> Iterator[Row]:
    """Samples of a calibration's text that none of its splits holds, until one part ends."""
    parts, length, seed = parts_of(used.source), used.meta["length"], used.meta["seed"]
    _, readers = opened(parts, encode, length, seed, used)
    turns = Turns(parts, length, f"{seed} further")
    while True:
        i = turns.next()
        with naming(parts[i], parts):
            row = next(readers[i][0], None)
        if row is None:
            return
        turns.took(i, counts(row))
        yield row
