"""Whether the blocks that stay would be built as they were, looked at without weights.

A table of fields says what is known. What it lacks - a scale made of the depth, a layer that only
the first block has - shows when the smaller model is built on the meta device beside the whole
one and their blocks are compared, module by module.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from isingcut.errors import ArchitectureError
from isingcut.ising.constraints import LinearConstraint
from isingcut.models.architectures import fields
from isingcut.models.architectures.auto import auto_class
from isingcut.models.architectures.base import BlockStack
from isingcut.models.architectures.discover import find_stack
from isingcut.models.architectures.surgery import cut_config
from isingcut.models.architectures.text_part import config_object
from isingcut.models.loading import quiet_transformers

# A block's own number is meant to change.
_NUMBER = re.compile(r"(layer|block)_?(idx|id|index|num|number|block_map)$")
# So are copies of fields that the table cuts, which the block itself reads at its own number.
_CUT = {
    *fields.GENERATORS,
    *fields.SLICE,
    *fields.INDICES,
    *fields.PREFIX,
    *fields.LAST,
    *fields.SUFFIX,
    *fields.CYCLE,
    *fields.MTP,
}
_PLAIN = (bool, int, float, str, type(None))
# States that are tried: runs of neighbours of at most so many blocks.
_LONGEST = 16


def check_same_blocks(
    config: dict[str, Any], stack: BlockStack, rows: Sequence[LinearConstraint]
) -> None:
    """Cut the first legal run of blocks from a configuration and compare those that stay.

    One state tells: every later block has another number then, and the depth is another.

    Args:
        config: a checkpoint's ``config.json``.
        stack: the model's blocks.
        rows: what every state has to obey.

    Raises:
        ArchitectureError: a block would be built otherwise; the message names what differs.
    """
    removed = _first_legal(len(stack), rows)
    whole = config_object(config)
    if removed is None or whole is None:
        return  # nothing can go, or code of its own: the proof of the cut is left
    before, after = _built(whole), _built(config_object(cut_config(config, removed)))
    place = find_stack(before).path
    old, new = (list(model.get_submodule(place).children()) for model in (before, after))
    kept = [i for i in range(len(old)) if i not in removed]
    for number, i in enumerate(kept):
        difference = _difference(old[i], new[number])
        if difference:
            raise ArchitectureError(
                f"block {i} would be another one as block {number} of a smaller model: "
                f"{difference}; it depends on the number of the block or on the depth, and "
                "isingcut knows no field that keeps it"
            )


def _first_legal(n: int, rows: Sequence[LinearConstraint]) -> list[int] | None:
    for size in range(1, min(_LONGEST, n - 1) + 1):
        for start in range(n - size + 1):
            state = np.zeros((1, n), dtype=bool)
            state[0, start : start + size] = True
            if all(row.satisfied(state)[0] for row in rows):
                return list(range(start, start + size))
    return None


def _built(config: Any) -> nn.Module:
    with quiet_transformers(), torch.device("meta"):
        model: nn.Module = auto_class(config).from_config(copy.deepcopy(config))
    return model


def _difference(old: nn.Module, new: nn.Module) -> str:
    """What tells two blocks apart in words; empty where nothing does."""
    left, right = dict(old.named_modules()), dict(new.named_modules())
    for name in left.keys() ^ right.keys():
        return f"{name} is there in only one of both"
    for name, module in left.items():
        other = right[name]
        place = f"{name}." if name else ""
        if type(module) is not type(other):
            return f"{name} is {type(module).__name__} and would be {type(other).__name__}"
        for key, value in _shapes(module).items():
            if value != (found := _shapes(other).get(key)):
                return f"{place}{key} has the shape {value} and would have {found}"
        for key, value in vars(module).items():
            if _NUMBER.search(key) or key in _CUT or not _is_plain(value):
                continue
            if not _equal(value, found := vars(other).get(key)):
                return f"{place}{key} is {value!r:.40} and would be {found!r:.40}"
    return ""


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return {name: tuple(tensor.shape) for name, tensor in own}


def _equal(value: Any, found: Any) -> bool:
    if isinstance(value, float) and isinstance(found, float):
        return math.isclose(value, found, rel_tol=1e-12)  # a scale that was rescaled
    return bool(value == found)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)
