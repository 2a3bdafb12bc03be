"""Renumber block numbers inside module names, patterns and tensor names."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence

from isingcut.errors import ArchitectureError

_LIST_NAMES = r"(?:layers|layer|h|blocks|block|blk)"
# "model.layers.3.mlp", "re:.*layers\\.3\\.mlp", "layers.1*": the number after the list's name.
_NUMBERED = re.compile(
    rf"(?:^|(?<=[.*:]))({_LIST_NAMES})(\\?\.)(\d+(?=$|[.\\*])|\\d\+|[0-9*?\[\]\-]+\+?)"
)
OTHER_STACKS = ("vision", "visual", "audio", "tower", "encoder")
"""Words in the names of modules that are of another modality."""


def renumbering(count: int, removed: Sequence[int]) -> dict[int, int]:
    """Old block number to new, for the blocks that stay.

    Raises:
        ArchitectureError: a removed block does not exist, is named twice, or none would stay.
    """
    chosen = set(removed)
    if len(chosen) != len(list(removed)):
        raise ArchitectureError(f"a block is named twice among those to remove: {list(removed)}")
    outside = sorted(i for i in chosen if not 0 <= i < count)
    if outside:
        raise ArchitectureError(
            f"blocks to remove must be 0 to {count - 1}; got {', '.join(map(str, outside))}"
        )
    if len(chosen) == count:
        raise ArchitectureError(f"all {count} blocks would be removed; keep at least one")
    return {old: new for new, old in enumerate(i for i in range(count) if i not in chosen)}


def rename_pattern(entry: str, mapping: dict[int, int], count: int) -> list[str]:
    """The entries that replace one module name or pattern of a quantisation list.

    Args:
        entry: a module name, a glob, or a regular expression marked ``re:``.
        mapping: as from `renumbering`.
        count: blocks before the cut; numbers from ``count`` on (extra heads) are dropped.

    Returns:
        the entry itself when it names no block, none when it only named removed blocks.

    Raises:
        ArchitectureError: a number pattern that cannot be renumbered exactly.
    """
    match = _NUMBERED.search(entry)
    if match is None or any(word in entry[: match.start()] for word in (*OTHER_STACKS, "mtp")):
        return [entry]
    number = match.group(3)
    if number.isdigit():
        old = int(number)
        # A glob straight after the digits ("layers.1*") also names 10 to 19.
        if entry[match.end() :].startswith("*") and not entry.startswith("re:"):
            number += "*"
        else:
            return [_put(entry, match, str(mapping[old]))] if old in mapping else []
    if number in {"*", r"\d+", "[0-9]+"}:
        return [entry]
    if entry.startswith("re:") or not re.fullmatch(r"[0-9*?\[\]\-]+", number):
        raise ArchitectureError(
            f"quantisation entry {entry!r} names blocks by a pattern that cannot be renumbered "
            "exactly; write one entry per block"
        )
    old_numbers = [i for i in range(count) if fnmatch.fnmatchcase(str(i), number)]
    tail = entry[match.start(3) + len(number) :]
    rest = tail if tail else ".*"
    head = entry[: match.start(3)]
    return [f"{head}{mapping[i]}{rest}" for i in old_numbers if i in mapping]


def _put(entry: str, match: re.Match[str], number: str) -> str:
    return entry[: match.start(3)] + number + entry[match.end(3) :]
