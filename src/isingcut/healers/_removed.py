"""Which blocks a cut checkpoint lacks: from its record, or by comparing weights with the original.

The second is for checkpoints that other tools cut (mergekit's passthrough, PruneMe, a user's own
loop): blocks that were kept are kept to the bit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from isingcut.architectures import find_stack, stack_modules
from isingcut.errors import InputError
from isingcut.healers import RECORD as HEALED
from isingcut.healers._patch_files import RECORD

if TYPE_CHECKING:
    from torch import nn

    from isingcut.models import LoadedModel

__all__ = ["recorded_removal", "removal_by_weights"]


def recorded_removal(folder: Path) -> tuple[tuple[int, ...], int] | None:
    """The blocks that a checkpoint lacks, and of how many, from the records inside it.

    Returns:
        None where there is no record.

    Raises:
        InputError: no checkpoint, or a record that cannot be read.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} is no checkpoint (no config.json in it); give the cut model")
    name = next((n for n in (RECORD, HEALED) if (folder / n).is_file()), None)
    if name is None:
        return None
    try:
        record = json.loads((folder / name).read_text(encoding="utf-8"))
        return tuple(sorted(int(i) for i in record["removed"])), int(record["of"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(
            f"{folder / name} is no readable record of a cut; delete it to have the blocks found "
            "by their weights"
        ) from e


def removal_by_weights(
    folder: Path, teacher: LoadedModel, *, trust_remote_code: bool = False
) -> tuple[int, ...]:
    """The blocks that a checkpoint lacks, found by comparing every kept block with the original's.

    Args:
        folder: the cut checkpoint.
        teacher: the model it was cut from, in memory.

    Raises:
        InputError: some block of it is none of the original's, in their order, or none is missing.
    """
    from isingcut.models import load

    student = load(
        folder,
        dtype=str(teacher.dtype).removeprefix("torch."),
        device=str(teacher.device),
        trust_remote_code=trust_remote_code,
    )
    ours, theirs = (stack_modules(m.model, find_stack(m.model)) for m in (student, teacher))
    kept: list[int] = []
    for place, block in enumerate(ours):
        first = kept[-1] + 1 if kept else 0
        found = next((i for i in range(first, len(theirs)) if _same(block, theirs[i])), None)
        if found is None:
            after = f"behind its block {kept[-1]}" if kept else "at all"
            raise InputError(
                f"{folder} has no {RECORD}, and its block {place} is no block of "
                f"{teacher.folder.name} {after}; expected a model with whole blocks removed and "
                "the others unchanged"
            )
        kept.append(found)
    removed = tuple(i for i in range(len(theirs)) if i not in kept)
    if not removed:
        raise InputError(f"{folder} lacks no block of {teacher.folder.name}; nothing to heal")
    return removed


def _same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two blocks have the same parameters, to the bit."""
    a, b = dict(one.named_parameters()), dict(other.named_parameters())
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
