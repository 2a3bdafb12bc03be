"""Text blocks that a configuration speaks of outside its decoder's part: where images enter.

A model whose images enter between its text blocks counts those blocks by their place in the stack,
in the vision tower's part or at the root. Text alone never shows it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from isingcut.errors import ArchitectureError
from isingcut.ising.constraints import LinearConstraint
from isingcut.models.architectures import fields
from isingcut.models.architectures.text_part import config_object

_RECEIVES = "image features (DeepStack) join the stream behind the first {} blocks, by their number"
_ENTERS = "image features join the stream in front of blocks {}, each at a place of its own"


def kept_blocks(config: dict[str, Any], count: int) -> dict[int, str]:
    """Blocks that must stay because image features join behind them, each with the reason.

    Args:
        config: a whole checkpoint's configuration.
        count: blocks of its decoder.
    """
    features = max((len(value) for _, value in _found(config, fields.DEEPSTACK)), default=0)
    return dict.fromkeys(range(min(features, count)), _RECEIVES.format(features))


def legality(config: dict[str, Any], count: int) -> list[LinearConstraint]:
    """The rows that keep every place at which image features join; arguments of `kept_blocks`."""
    rows = [
        _row(f"keep block {i}", range(i, i + 1), count, reason)
        for i, reason in kept_blocks(config, count).items()
    ]
    places, reason = _places(config, count)
    return rows + [_row(f"keep {_words(place)}", place, count, reason) for place in places]


def renumber(config: dict[str, Any], count: int, mapping: Mapping[int, int]) -> None:
    """Let image features join, in place, in front of the same kept blocks as before.

    Features in front of a removed block join in front of the next one: between them is nothing.

    Args:
        config: a whole checkpoint's configuration.
        count: blocks of its decoder.
        mapping: old block number to new, of those that stay.

    Raises:
        ArchitectureError: features would join behind the last block, or where others do.
    """
    places, reason = _places(config, count)
    for place in places:
        if not any(i in mapping for i in place):
            raise ArchitectureError(f"{_words(place)} has to stay: {reason}")

    def moved(block: int) -> int:
        if not 0 <= block < count:
            return block  # Never met, before and after.
        return next(mapping[i] for i in range(block, count) if i in mapping)

    for path, value in list(_found(config, fields.IMAGE_ENTRIES)):
        part = config
        for key in path[:-1]:
            part = part.setdefault(key, {})
        part[path[-1]] = [
            [*item[:-1], moved(item[-1])] if isinstance(item, (list, tuple)) else moved(item)
            for item in value
        ]


def _places(config: dict[str, Any], count: int) -> tuple[list[range], str]:
    """Of each place at which features join, the blocks up to the next place; and why one stays."""
    joined = {
        item[-1] if isinstance(item, (list, tuple)) else item
        for _, value in _found(config, fields.IMAGE_ENTRIES)
        for item in value
    }
    blocks = sorted(i for i in joined if 0 <= i < count)
    reason = _ENTERS.format(", ".join(map(str, blocks)))
    return [range(*ends) for ends in pairwise([*blocks, count])], reason


def _words(place: range) -> str:
    if len(place) == 1:
        return f"block {place.start}"
    return f"one of blocks {place.start} to {place.stop - 1}"


def _found(config: dict[str, Any], names: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Lists of these names, with the keys that lead to them, defaults of the class among them."""
    derived = config_object(config)

    def walk(part: dict[str, Any], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
        for key, value in part.items():
            if key in names and isinstance(value, (list, tuple)):
                yield (*path, key), value
            elif isinstance(value, dict):
                yield from walk(value, (*path, key))

    return walk(config if derived is None else derived.to_dict(), ())


def _row(name: str, blocks: range, count: int, reason: str) -> LinearConstraint:
    row = np.zeros(count)
    row[blocks.start : blocks.stop] = 1.0
    return LinearConstraint(name, row, "<=", float(len(blocks) - 1), reason)
