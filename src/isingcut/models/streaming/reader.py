"""Assign stored tensors to the parts of a model, and read parts into a buffer.

Names and conversions (for example, of a list of experts to one tensor) are those of transformers,
so that a streamed block has the same values as after `from_pretrained`.

Files are read, not memory-mapped: mapped pages would stay in the process's resident memory, while a
buffer has a known size.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isingcut.errors import ModelError
from isingcut.formats.architectures.blocks import language_model, stack_modules
from isingcut.formats.fp8 import (
    fp8_layout,
    read_plain,
    tile_of,
    torch_dtype,
    weights_of,
)
from isingcut.formats.libraries import explain_shape, refuse_incomplete, refuse_infinite
from isingcut.formats.safetensors_files import (
    StoredTensor,
    read_checkpoint,
    read_config,
)
from isingcut.formats.transformers_private import Names
from isingcut.models.replay import EMBED, HEAD, Part

REST = "rest"
"""Part outside the blocks, the embedding and the head: norm, position embeddings, buffers."""
# Alignment of tensors in a buffer, in bytes, for vector instructions and matrix kernels.
_ALIGN = 64


@dataclass(frozen=True)
class CopyStep:
    """Copy of a stored tensor to a tensor of the model (the target), or to one slice of it.

    Attributes:
        place: index of the slice in the target; empty for the whole target.
    """

    source: StoredTensor
    target: str
    place: tuple[int | slice, ...] = ()


@dataclass(frozen=True)
class ConversionStep:
    """Conversion of stored tensors to targets by one of transformers' converters."""

    sources: tuple[tuple[str, StoredTensor], ...]
    dtype: torch.dtype
    first: str
    converter: Any
    model: Any

    def run(self, values: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Compute the values of the targets from those of the sources."""
        converter = deepcopy(self.converter)
        for (pattern, source), value in zip(self.sources, values, strict=True):
            # A callable, which transformers' own loader also passes if it uses no threads.
            converter.add_tensor(
                self.first, source.name, pattern, lambda value=value: value
            )
        out = converter.convert(self.first, model=self.model, config=self.model.config)
        return {k: v[0] if isinstance(v, list) else v for k, v in out.items()}


@dataclass(frozen=True)
class Group:
    """Targets, on the meta device, that are filled together, and the steps that fill them."""

    targets: Mapping[str, Tensor]
    steps: tuple[CopyStep | ConversionStep, ...]


@dataclass(frozen=True)
class PartPlan:
    """Plan to fill one part.

    Attributes:
        steps: the steps that read tensors.
        targets: tensors to fill, each with its first byte in the part's buffer.
        names: target of each tensor name in this part of the model.
        size: bytes of the buffer.
    """

    steps: tuple[CopyStep | ConversionStep, ...]
    targets: Mapping[str, tuple[Tensor, int]]
    names: Mapping[str, str]
    size: int


def plan_parts(
    folder: Path, stored: Mapping[str, StoredTensor], model: Any, dtype: torch.dtype
) -> tuple[dict[Part, PartPlan], list[str]]:
    """Plan how to fill each block, the embedding, the head and the rest of a model.

    Args:
        folder: folder of the checkpoint, for messages.
        stored: tensors of the checkpoint.
        model: the model without its weights.
        dtype: dtype of the model.

    Returns:
        the plan of each part, and the names of stored tensors that the model does not use.

    Raises:
        ModelError: tensors are missing from the checkpoint, or have other shapes.
    """
    names = Names(model, dtype)
    groups, unexpected = _groups(folder, stored, names)
    group_of = {name: group for group in groups for name in group.targets}
    kept = _resolve_names(folder, names, set(group_of))
    decoder = language_model(model)
    parts: dict[Any, Part] = {
        decoder.get_input_embeddings(): EMBED,
        decoder.get_output_embeddings(): HEAD,
    }
    parts |= {block: i for i, block in enumerate(stack_modules(model))}
    paths = {path: parts[m] for path, m in model.named_modules() if m in parts}
    members: dict[Part, dict[str, str]] = {p: {} for p in (*parts.values(), REST)}
    for name, target in kept.items():
        stems = (name[: dot.start()] for dot in re.finditer(r"\.", name))
        part = next((paths[stem] for stem in stems if stem in paths), REST)
        members[part][name] = target
    plans = {part: _layout(found, group_of) for part, found in members.items()}
    return plans, unexpected


def _layout(names: Mapping[str, str], group_of: Mapping[str, Group]) -> PartPlan:
    """Assign a place in the buffer to each target of a part; tied names share one place."""
    groups = {id(group_of[t]): group_of[t] for t in names.values()}.values()
    targets: dict[str, tuple[Tensor, int]] = {}
    size = 0
    for name, target in (item for group in groups for item in group.targets.items()):
        start = -(-size // _ALIGN) * _ALIGN
        targets[name] = (target, start)
        size = start + target.nbytes
    return PartPlan(
        tuple(s for group in groups for s in group.steps), targets, names, size
    )


def _resolve_names(folder: Path, names: Names, there: set[str]) -> dict[str, str]:
    """Return the target of each name in the model; tied names have one target.

    Raises:
        ModelError: the checkpoint has no tensor for a parameter.
    """
    kept = {name: name for name in names.tensors if name in there}
    # Either may be stored. If both are, transformers ties them only if they are equal.
    for this, that in names.ties.items():
        if this in there:
            kept.setdefault(that, this)
    for this, that in names.ties.items():
        if that in kept:
            kept.setdefault(this, kept[that])
    missing = [n for n in names.tensors if n not in kept and not names.may_miss(n)]
    refuse_incomplete({"missing_keys": missing, "mismatched_keys": ()}, folder)
    return kept


def _groups(
    folder: Path, stored: Mapping[str, StoredTensor], names: Names
) -> tuple[list[Group], list[str]]:
    """Group the stored tensors by target; also return the names that the model does not use."""
    unexpected: list[str] = []
    groups: list[Group] = []
    together: dict[str, list[tuple[str, StoredTensor]]] = {}
    for name in sorted(stored, key=names.order):
        tensor = stored[name]
        target, pattern = names.target(name)
        if not names.is_known(target):
            unexpected.append(name)
        elif target in names.tensors and pattern is not None:
            together.setdefault(target, []).append((pattern, tensor))
        elif target in names.tensors:
            shape = tuple(names.tensors[target].shape)
            _same_shape(folder, name, tensor.shape, shape)
            made = torch.empty(shape, dtype=names.dtype_of(target), device="meta")
            groups.append(Group({target: made}, (CopyStep(tensor, target),)))
    for first, members in together.items():
        groups.append(_join_group(folder, first, members, names))
    return groups, unexpected


def _join_group(
    folder: Path, first: str, members: Sequence[tuple[str, StoredTensor]], names: Names
) -> Group:
    """Group the tensors of one converter, as slices of its target if it only stacks and
    concatenates them."""
    converter = names.converters[members[0][0]]
    dtype = names.dtype_of(first)
    conversion = ConversionStep(tuple(members), dtype, first, converter, names.model)
    made = conversion.run(
        [torch.empty(source.shape, dtype=dtype, device="meta") for _, source in members]
    )
    targets = {
        name: value.to(dtype) for name, value in made.items() if name in names.tensors
    }
    for name, target in targets.items():
        _same_shape(folder, name, tuple(target.shape), tuple(names.tensors[name].shape))
    slices = (
        _slices(converter, members, first) if len(targets) == len(made) == 1 else None
    )
    return Group(targets, tuple(slices) if slices else (conversion,))


def _slices(
    converter: Any, members: Sequence[tuple[str, StoredTensor]], target: str
) -> list[CopyStep] | None:
    """Return one copy step per tensor, or None unless a conversion only stacks and joins."""
    kinds = [type(op).__name__ for op in converter.operations]
    stacked = kinds[0] == "MergeModulelist"
    joined = kinds[-1] == "Concatenate"
    if kinds != ["MergeModulelist"] * stacked + ["Concatenate"] * joined:
        return None
    if stacked and converter.operations[0].dim != 0:
        return None
    # Axis within one item, without the axis along which items are stacked.
    axis = converter.operations[-1].dim - stacked if joined else None
    if axis is not None and axis < 0:
        return None
    out: list[CopyStep] = []
    first = 0
    for wanted in converter.source_patterns:
        items = [source for pattern, source in members if pattern == wanted]
        for k, source in enumerate(items):
            place: tuple[int | slice, ...] = (k,) if stacked else ()
            if axis is not None:
                end = first + source.shape[axis]
                place += (*[slice(None)] * axis, slice(first, end))
                # The items of one stack begin at the same index.
                if not stacked or source is items[-1]:
                    first = end
            out.append(CopyStep(source, target, place))
    return out


def _same_shape(
    folder: Path, name: str, found: tuple[int, ...], wanted: tuple[int, ...]
) -> None:
    if found != wanted:
        raise ModelError(explain_shape(name, folder, found, wanted))


# Bytes converted at a time: small enough for a cache, large enough for efficient reads.
_STAGE = 4 * 2**20


class Reader:
    """Reader of the parts of one checkpoint, one at a time, into buffers.

    Args:
        folder: folder of the checkpoint.
        model: the model without its weights.
        dtype: dtype of the model.

    Attributes:
        plans: plan of each part.
        unexpected: names of stored tensors that the model does not use.
    """

    def __init__(self, folder: Path, model: object, dtype: torch.dtype) -> None:
        raw = read_config(folder)
        self._folder = folder
        self._fp8 = fp8_layout(folder, raw) is not None
        self._tile = tile_of(raw)
        self._stored = read_checkpoint(folder)
        self._dtype = dtype
        self._stage = bytearray(_STAGE)
        self._lock = threading.Lock()
        self._checked: set[Part] = set()
        stored = weights_of(self._stored) if self._fp8 else self._stored
        self.plans, self.unexpected = plan_parts(folder, stored, model, dtype)

    def fill(self, part: Part, buffer: Tensor) -> dict[str, Tensor]:
        """Read one part. The first time, also check it for NaN and infinity.

        Args:
            buffer: (>= the part's size,) uint8 in host memory.

        Returns:
            views of the buffer, by tensor name in the model (tied ones under each name).

        Raises:
            CheckpointError: a file became shorter, a dtype is not supported, or a tensor has NaN
                or infinity.
        """
        plan = self.plans[part]
        views = plan_views(plan, buffer)
        # `Store.keep` may read a part while the thread of `Buffers` reads another one.
        with self._lock, torch.no_grad():
            for step in plan.steps:
                if isinstance(step, CopyStep):
                    self._copy(step.source, views[step.target][step.place])
                    continue
                values = [self._value(source, step.dtype) for _, source in step.sources]
                for name, value in step.run(values).items():
                    if name in views:
                        views[name].copy_(value)
        if part not in self._checked:
            refuse_infinite(views.items(), self._folder)
            self._checked.add(part)
        return {name: views[target] for name, target in plan.names.items()}

    def _copy(self, source: StoredTensor, view: Tensor) -> None:
        """Read and convert a tensor, a few megabytes at a time; float8 whole, with its scale."""
        if not view.numel():
            return
        if source.dtype.startswith("F8_"):
            view.copy_(
                read_plain(source.name, self._stored, self._tile).to(self._dtype)
            )
            return
        if not view.is_contiguous():
            view.copy_(self._value(source, view.dtype))
            return
        dtype = torch_dtype(source)
        flat = view.view(-1)
        if dtype is view.dtype:
            plain: Any = flat.view(torch.uint8).numpy()
            source.read_into(memoryview(plain))
            return
        # In an FP8 checkpoint, such weights are first converted to the model's dtype.
        narrowed = self._fp8 and source.dtype in ("BF16", "F16")
        for first in range(0, source.size, _STAGE):
            data = memoryview(self._stage)[: min(_STAGE, source.size - first)]
            source.read_into(data, first)
            piece = torch.frombuffer(data, dtype=dtype)
            start = first // dtype.itemsize
            flat[start : start + len(piece)].copy_(
                piece.to(self._dtype) if narrowed else piece
            )

    def _value(self, source: StoredTensor, dtype: torch.dtype) -> Tensor:
        """Read one whole stored tensor, dequantised and converted to ``dtype``."""
        found = torch.empty(source.shape, dtype=dtype)
        self._copy(source, found)
        return found


def plan_views(plan: PartPlan, buffer: Tensor) -> dict[str, Tensor]:
    """Return the targets of a part as views of its buffer."""
    return {
        name: buffer[start : start + target.nbytes]
        .view(target.dtype)
        .view(target.shape)
        for name, (target, start) in plan.targets.items()
    }
