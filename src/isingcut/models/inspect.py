"""What `isingcut inspect` shows: blocks, costs and legal states, without loading weights.

The blocks that stay must be built as they were. The table of fields knows most of what matters. For
the rest (a scale that depends on the depth, a layer that only the first block has), the smaller
model is built on the meta device next to the whole one, and their blocks are compared module by
module.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from isingcut.errors import ArchitectureError
from isingcut.ising.constraints import LinearConstraint
from isingcut.models.architectures import fields
from isingcut.models.architectures.blocks import Block, BlockStack, find_stack, text_config
from isingcut.models.architectures.cuts import cut_config, legality
from isingcut.models.architectures.fields import config_object
from isingcut.models.device import pick_device, pick_devices, pick_dtype
from isingcut.models.fit import check_fit, check_sizes, group_by_block
from isingcut.models.load import build_on_meta, find_auto_class
from isingcut.models.loading import quiet_transformers
from isingcut.models.placement import place
from isingcut.models.safetensors_files import StoredTensor

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
    before, after = _build(whole), _build(config_object(cut_config(config, removed)))
    place = find_stack(before).path
    old, new = (list(model.get_submodule(place).children()) for model in (before, after))
    kept = [i for i in range(len(old)) if i not in removed]
    for number, i in enumerate(kept):
        difference = _difference(old[i], new[number])
        if difference:
            raise ArchitectureError(
                f"block {i} would change as block {number} of a smaller model: {difference}; it "
                "depends on the block number or on the depth, and isingcut knows no field that "
                "keeps it"
            )


def _first_legal(n: int, rows: Sequence[LinearConstraint]) -> list[int] | None:
    for size in range(1, min(_LONGEST, n - 1) + 1):
        for start in range(n - size + 1):
            state = np.zeros((1, n), dtype=bool)
            state[0, start : start + size] = True
            if all(row.satisfied(state)[0] for row in rows):
                return list(range(start, start + size))
    return None


def _build(config: Any) -> nn.Module:
    with quiet_transformers(), torch.device("meta"):
        model: nn.Module = find_auto_class(config).from_config(copy.deepcopy(config))
    return model


def _difference(old: nn.Module, new: nn.Module) -> str:
    """Explain how two blocks differ; empty if they do not."""
    left, right = dict(old.named_modules()), dict(new.named_modules())
    for name in left.keys() ^ right.keys():
        return f"{name} is in only one of them"
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


@dataclass(frozen=True)
class Inspection:
    """A model's blocks and which states are legal.

    Args:
        model_type: the decoder's, for example ``"qwen3_moe"``.
        stack: its blocks; ``bytes`` are those stored where the checkpoint is there.
        rows: what every state has to obey.
        refusal: why no state can be cut; empty where cutting works.
        quantisation: the quantisation method; empty for plain weights.
        other_bytes: stored bytes outside the blocks; 0 without weights.
        parameters: of the whole model, embeddings included.
        positions: the longest sequence, where the model has a limit.
        placement: the first and the last block on each device, where there are several.
    """

    model_type: str
    stack: BlockStack
    rows: tuple[LinearConstraint, ...]
    refusal: str
    quantisation: str
    other_bytes: int
    parameters: int
    positions: int | None
    placement: dict[str, tuple[int, int]]

    def rules(self) -> list[str]:
        """Return the legality rows in words, rows with the same reason together."""
        names: dict[str, list[str]] = {}
        for row in self.rows:
            names.setdefault(row.reason, []).append(row.name)
        return [f"{', '.join(rows)}: {reason}" for reason, rows in names.items()]

    def table(self) -> list[tuple[str, ...]]:
        """Return a header, one row per run of equal neighbours, and the sum, as text.

        Columns: numbers of the blocks, kind, then for *each* block of the run parameters, active
        parameters, stored bytes, bytes of KV cache per token and of recurrent state.
        """
        header: tuple[str, ...] = (
            "blocks",
            "kind",
            "parameters",
            "active",
            "bytes",
            "KV bytes/token",
            "state bytes",
        )
        rows = [header]
        for (kind, costs), run in groupby(self.stack.blocks, lambda b: (b.kind, _costs(b))):
            indices = [block.index for block in run]
            first, last = indices[0], indices[-1]
            numbers = f"{first}" if first == last else f"{first}-{last}"
            rows.append((numbers, kind, *(f"{n:,}" for n in costs)))
        total = [sum(column) for column in zip(*map(_costs, self.stack.blocks), strict=True)]
        rows.append(("all", "", *(f"{n:,}" for n in total)))
        return rows


_costs: Callable[[Block], tuple[int, ...]] = attrgetter(
    "parameters", "active_parameters", "bytes", "kv_bytes_per_token", "state_bytes"
)


def inspect_model(
    folder: Path,
    *,
    trust_remote_code: bool = False,
    dtype: str = "auto",
    device: str = "cpu",
    memory_limit: str = "",
    cards_per_process: int | None = None,
) -> Inspection:
    """Find a checkpoint's blocks on the meta device and say which states are legal.

    Args:
        folder: a Hugging Face folder; only its ``config.json`` is needed, and tensor headers
            are used for the stored bytes where there are weights.
        trust_remote_code: allow the model's own code to run.
        dtype, device, memory_limit, cards_per_process: those of a run.

    Raises:
        ModelError: transformers cannot build the model, or it has tensors of another number of
            blocks than its configuration has.
        CheckpointError: the configuration or a header is damaged.
        ArchitectureError: it has no block stack.
    """
    seen = check_fit(Path(folder), weights=False)
    model, _ = build_on_meta(seen, trust_remote_code=trust_remote_code)
    check_sizes(seen, model)
    stack = find_stack(model)
    refusal, rows = "", []
    try:
        rows = legality(seen.config, stack)
        check_same_blocks(seen.config, stack, rows)
    except ArchitectureError as error:
        refusal = str(error)
    stack, other = _stored_bytes(seen.stored, stack)
    parameters = sum(p.numel() for p in model.parameters())
    size = parameters * pick_dtype(dtype, pick_device(device)).itemsize
    devices = pick_devices(device, size, memory_limit, cards_per_process)
    placement: dict[str, tuple[int, int]] = {}
    if len(devices) > 1:
        places = place(model, devices, memory_limit)
        runs = [(d, [*run]) for d, run in groupby(stack.blocks, lambda b: places[b.path])]
        placement = {str(d): (run[0].index, run[-1].index) for d, run in runs}
    quantisation = seen.config.get("quantization_config") or {}
    return Inspection(
        model_type=str(text_config(model).model_type),
        stack=stack,
        rows=tuple(rows),
        refusal=refusal,
        quantisation=str(quantisation.get("quant_method") or quantisation.get("quant_algo") or ""),
        other_bytes=other,
        parameters=parameters,
        positions=getattr(text_config(model), "max_position_embeddings", None),
        placement=placement,
    )


def _stored_bytes(stored: Mapping[str, StoredTensor], stack: BlockStack) -> tuple[BlockStack, int]:
    """Return the stack with the bytes that the checkpoint stores, and the bytes outside it."""
    if not stored:
        return stack, 0
    found = group_by_block(stored, len(stack), heads=len(stack))
    sizes = [sum(tensor.size for tensor in block.values()) for block in found]
    blocks = tuple(
        dataclasses.replace(block, bytes=size)
        for block, size in zip(stack.blocks, sizes, strict=True)
    )
    return BlockStack(stack.path, blocks), sum(t.size for t in stored.values()) - sum(sizes)
