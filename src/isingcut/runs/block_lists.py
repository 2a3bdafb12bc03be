"""Lists of blocks that a user names, out of any text: typed, a file, standard input, JSON."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from isingcut.errors import InputError
from isingcut.files.inputs import parse_json, read_text, user_path
from isingcut.options.spellings import block_span, expanded

_STDIN = "-"
_LONGEST = 2**20


@dataclass(frozen=True)
class NamedBlocks:
    """Block numbers as a text names them, not yet compared with a model.

    Attributes:
        numbers: ascending, each once.
        where: what messages call the text.
        one_based: they count from 1.
    """

    numbers: tuple[int, ...]
    where: str
    one_based: bool = False

    def of(self, total: int) -> list[int]:
        """The removed blocks of a model of ``total`` blocks, counted from 0.

        Raises:
            InputError: a block that the model does not have.
        """
        first = 1 if self.one_based else 0
        last = total - 1 + first
        wrong = [b for b in self.numbers if not first <= b <= last]
        if wrong:
            hint = ""
            if wrong == [total] and not self.one_based and self.numbers[0] > 0:
                hint = "; if the list counts from 1, add --one-based"
            elif self.one_based and wrong == [0]:
                hint = "; if the list counts from 0, leave --one-based away"
            named = ", ".join(str(b) for b in wrong[:8]) + (", ..." if len(wrong) > 8 else "")
            raise InputError(
                f"{self.where}: this model's blocks are numbered {first} to {last}, got "
                f"{named}{hint}"
            )
        return [b - first for b in self.numbers]


def read_blocks(source: str, *, one_based: bool = False) -> NamedBlocks:
    """The removed blocks that a text names, from the text itself, ``@FILE`` or ``-`` (stdin).

    Args:
        source: ``"3,4,9"``, ``"@blocks.txt"`` or ``"-"``.
        one_based: the text counts blocks from 1, as papers often do.

    Raises:
        InputError: no plain file of at most 1 MiB, or no list of block numbers.
    """
    if source == _STDIN:
        text, where = _piped(), "standard input"
    elif source.startswith("@"):
        path = user_path(source[1:])
        text, where = read_text(path, f"--blocks {source}:", limit=_LONGEST), str(path)
    else:
        text, where = source, f"--blocks {source if len(source) < 60 else source[:57] + '...'}"
    return NamedBlocks(tuple(parse_blocks(text, where)), where, one_based)


def _piped() -> str:
    try:
        text = sys.stdin.read(_LONGEST + 1)
    except UnicodeDecodeError as e:
        raise InputError("standard input is no UTF-8 text; expected block numbers") from e
    if len(text) > _LONGEST:
        raise InputError(
            f"standard input has more than {_LONGEST} characters; expected block numbers"
        )
    return text


def parse_blocks(text: str, where: str = "the list") -> list[int]:
    """Block numbers out of a text: commas, spaces, lines, ``5-8``, JSON, or our own records.

    Raises:
        InputError: empty, something that is no block number, or one above 99,999.

    >>> parse_blocks("3, 4 9"), parse_blocks("[3, 4, 9]"), parse_blocks("3\\n4-6 # middle")
    ([3, 4, 9], [3, 4, 9], [3, 4, 5, 6])
    >>> parse_blocks('{"removed": [3, 4]}')
    [3, 4]
    """
    try:
        items = _items(parse_json(text), where)
    except ValueError:
        lines = (line.partition("#")[0] for line in text.splitlines())
        items = [part for line in lines for part in re.split(r"[\s,;]+", line.strip("[]() \t"))]
    spans = []
    for item in items:
        if item == "":
            continue
        plain = isinstance(item, str | int) and not isinstance(item, bool)
        try:
            span = block_span(str(item)) if plain else None
        except InputError as e:
            raise InputError(f"{where}: {e}") from e
        if span is None:
            raise InputError(
                f"{where}: {str(item)[:40]!r} is no block number; expected numbers apart by "
                "commas, spaces or lines (3,4,9 or 5-8), or a JSON list"
            )
        spans.append(span)
    if not spans:
        raise InputError(f"{where} names no block; expected a list like 3,4,9")
    return expanded(spans)


def _items(value: Any, where: str) -> Sequence[Any]:
    """The list in a JSON value: the value itself, or what a results file calls removed."""
    if isinstance(value, dict):
        held = value.get("removed", value.get("chosen", {}))
        value = held.get("removed") if isinstance(held, dict) else held
        if not isinstance(value, list):
            raise InputError(f'{where}: a JSON object needs its blocks as "removed": [...]')
    return value if isinstance(value, list) else [value]
