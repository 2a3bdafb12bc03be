"""Find blocks, costs and legal states for `isingcut inspect`, without loading weights.

The kept blocks must be built as in the original. The tables in `fields` ensure most of this. For
the rest (a scale that depends on the depth, a layer that only the first block has), the smaller
model is built on the meta device next to the whole one, and their blocks are compared module by
module.
"""

import copy
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from isingcut.errors import ArchitectureError
from isingcut.files.runs import BlockCosts
from isingcut.formats.architectures import fields
from isingcut.formats.architectures.blocks import BlockStack, find_stack, text_config
from isingcut.formats.architectures.cuts import cut_config, legality
from isingcut.formats.architectures.fields import config_object
from isingcut.formats.checkpoints import Checkpoint, check_sizes
from isingcut.formats.libraries import quiet_transformers
from isingcut.ising.constraints import LinearConstraint
from isingcut.ising.states import states_of
from isingcut.models.cache import copy_cache, count_cache
from isingcut.models.device import pick_device, pick_devices, pick_dtype
from isingcut.models.load import build_on_meta, find_auto_class, find_unused
from isingcut.models.placement import place
from isingcut.models.sublayers import split_layers

# Attributes with a block's own number, which a cut changes.
_NUMBER = re.compile(r"(layer|block)_?(idx|id|index|num|number|block_map)$")
# Copies of fields that a cut changes too; the block reads them at its own number.
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
# Largest number of adjacent blocks in the states that are tried.
_LONGEST = 16


def check_same_blocks(
    config: dict[str, Any], stack: BlockStack, rows: Sequence[LinearConstraint]
) -> None:
    """Cut the first legal run of blocks from a configuration and compare the kept blocks.

    One state is enough, because it changes the depth and the number of every later block.

    Args:
        config: a checkpoint's ``config.json``.
        stack: the model's blocks.
        rows: constraints that every state must satisfy.

    Raises:
        ArchitectureError: a kept block would be built differently; the message has the difference.
    """
    removed = _first_legal(len(stack), rows)
    whole = config_object(config)
    if removed is None or whole is None:
        return  # no block can be removed, or custom code, which the cut's verification checks
    before = _build(whole)
    after = _build(config_object(cut_config(config, removed)))
    place = find_stack(before).path
    old, new = (
        list(model.get_submodule(place).children()) for model in (before, after)
    )
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
            removed = list(range(start, start + size))
            state = states_of(n, [removed])
            if all(row.satisfied(state)[0] for row in rows):
                return removed
    return None


def _build(config: Any) -> nn.Module:
    with quiet_transformers(), torch.device("meta"):
        model: nn.Module = find_auto_class(config).from_config(copy.deepcopy(config))
    return model


def _difference(old: nn.Module, new: nn.Module) -> str:
    """Explain how two blocks differ; return an empty string if they do not."""
    left = dict(old.named_modules())
    right = dict(new.named_modules())
    for name in left.keys() ^ right.keys():
        return f"{name} is in only one of them"
    for name, module in left.items():
        there = _plain_values(right[name])
        for key, value in _plain_values(module).items():
            other: Any = there.get(key)
            # Rescaled scales differ by rounding.
            floats = isinstance(value, float) and isinstance(other, float)
            if floats and math.isclose(value, other, rel_tol=1e-12):
                continue
            if value != other:
                place = f"{name}.{key}".strip(".")
                return f"{place} is {value!r:.40} and would be {other!r:.40}"
    return ""


def _plain_values(module: nn.Module) -> dict[str, Any]:
    """Return the class of a module, the shapes of its tensors, and its attributes."""
    tensors = {**module._parameters, **module._buffers}
    shapes = {name: [*t.shape] for name, t in tensors.items() if t is not None}
    plain = {
        key: value
        for key, value in vars(module).items()
        if not _NUMBER.search(key) and key not in _CUT and _is_plain(value)
    }
    return {"": type(module).__name__, **shapes, **plain}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


@dataclass(frozen=True)
class Inspection:
    """Blocks and legal states of a model.

    Args:
        model_type: model type of the decoder, for example ``"qwen3_moe"``.
        stack: its blocks; ``bytes`` are stored bytes if the checkpoint has weights.
        rows: constraints that every state must satisfy.
        refusal: reason why no state can be cut; empty if cutting works.
        quantisation: quantisation method; empty for plain weights.
        other_bytes: stored bytes outside the blocks; 0 without weights.
        parameters: number of parameters of the whole model, embeddings included.
        positions: length of the longest sequence, if the model has a limit.
        unused: stored tensors that the model does not use, see `find_unused`.
        placement: first and last block on each device, if there are several.
    """

    model_type: str
    stack: BlockStack
    rows: tuple[LinearConstraint, ...]
    refusal: str
    quantisation: str
    other_bytes: int
    parameters: int
    positions: int | None
    unused: list[str]
    placement: dict[str, tuple[int, int]]

    def rules(self) -> list[str]:
        """Return the constraints as text, with one line for each reason."""
        names: dict[str, list[str]] = {}
        for row in self.rows:
            names.setdefault(row.reason, []).append(row.name)
        return [f"{', '.join(rows)}: {reason}" for reason, rows in names.items()]

    def table(self) -> list[tuple[str, ...]]:
        """Return a header, one row per run of equal adjacent blocks, and the total, as text.

        Columns: block numbers, kind, and for *each* block of the run: parameters, active
        parameters, stored bytes, bytes of KV cache per token and bytes of recurrent state.
        """
        costs = ("parameters", "active", "bytes", "KV bytes/token", "state bytes")
        rows: list[tuple[str, ...]] = [("blocks", "kind", *costs)]
        for (kind, each), run in groupby(
            self.stack.blocks, lambda b: (b.kind, _costs(b))
        ):
            indices = [block.index for block in run]
            first = indices[0]
            last = indices[-1]
            numbers = f"{first}" if first == last else f"{first}-{last}"
            rows.append((numbers, kind, *(f"{n:,}" for n in each)))
        total = [
            sum(column) for column in zip(*map(_costs, self.stack.blocks), strict=True)
        ]
        rows.append(("all", "", *(f"{n:,}" for n in total)))
        return rows


_costs: Callable[[BlockCosts], tuple[int, ...]] = attrgetter(
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
    units: str = "blocks",
) -> Inspection:
    """Find the blocks of a checkpoint on the meta device, and the legal states.

    Args:
        folder: a Hugging Face folder; only its ``config.json`` is needed. If there are weights,
            their headers give the stored bytes.
        trust_remote_code: allow the model's own code to run.
        dtype, device, memory_limit, cards_per_process, units: options as for a run.

    Raises:
        ModelError: transformers cannot build the model, or tensors and configuration have
            different numbers of blocks.
        CheckpointError: the configuration or a header is damaged.
        ArchitectureError: the model has no block stack.
    """
    seen = Checkpoint.read(folder, weights=False)
    model, _ = build_on_meta(seen, trust_remote_code=trust_remote_code)
    check_sizes(seen, model)
    stack = find_stack(model)
    if dtype != "auto":
        model.to(pick_dtype(dtype, pick_device(device)))
    count_cache(model, stack)
    refusal = ""
    rows = []
    try:
        rows = legality(seen.config, stack)
        check_same_blocks(seen.config, stack, rows)
    except ArchitectureError as error:
        refusal = str(error)
    if units == "sublayers" and not refusal:
        whole = stack
        split_layers(model)
        stack = find_stack(model)
        copy_cache(whole, stack)
        rows = legality(seen.config, stack)
    parameters = sum(p.numel() for p in model.parameters())
    size = parameters * pick_dtype(dtype, pick_device(device)).itemsize
    devices = pick_devices(device, size, memory_limit, cards_per_process)
    placement: dict[str, tuple[int, int]] = {}
    if len(devices) > 1:
        places = place(model, devices, memory_limit)
        runs = [
            (d, [*run]) for d, run in groupby(stack.blocks, lambda b: places[b.path])
        ]
        placement = {str(d): (run[0].index, run[-1].index) for d, run in runs}
    other = 0
    if seen.stored:
        layers = [sum(t.size for t in each.values()) for each in seen.by_block()]
        sizes = np.bincount(stack.layers, [b.parameters for b in stack.blocks])
        for block, layer in zip(stack.blocks, stack.layers, strict=True):
            share = block.parameters / max(1.0, sizes[layer])
            block.bytes = round(layers[layer] * share)
        other = sum(t.size for t in seen.stored.values()) - sum(layers)
    quantisation = seen.config.get("quantization_config") or {}
    return Inspection(
        model_type=str(text_config(model).model_type),
        stack=stack,
        rows=tuple(rows),
        refusal=refusal,
        quantisation=str(
            quantisation.get("quant_method") or quantisation.get("quant_algo") or ""
        ),
        other_bytes=other,
        parameters=parameters,
        positions=getattr(text_config(model), "max_position_embeddings", None),
        unused=find_unused(seen, model),
        placement=placement,
    )
