"""Which stored tensors fill which part of a model, and where in a buffer each one goes.

The names and conversions (a list of experts that becomes one tensor, say) are transformers'
own, so that a streamed block has the numbers that `from_pretrained` gives it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from isingcut.errors import ModelError
from isingcut.models.checkpoint.read import StoredTensor, read_checkpoint
from isingcut.models.fp8 import weights_of
from isingcut.models.loading import wrong_shape
from isingcut.models.parts import EMBED, HEAD, Part
from isingcut.models.text_alone import language_model
from isingcut.models.transformers_private import Names

REST = "rest"
"""What is neither a block, the embedding nor the head: norms, position embeddings, buffers."""
# Where a tensor starts in a buffer: what vector instructions and matrix kernels want.
_ALIGN = 64


@dataclass(frozen=True)
class ModelTensor:
    """One parameter or buffer of the model."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Copied:
    """A stored tensor that is a target, or that is one slice of it.

    Attributes:
        item: which item of a stack it is, for a target that stacks a list.
        axis: where joined tensors meet; None where nothing is joined.
        first: position on that axis.
    """

    source: StoredTensor
    target: str
    item: int | None = None
    axis: int | None = None
    first: int = 0

    def place(self, target: torch.Tensor) -> torch.Tensor:
        """The view of the target that the stored tensor fills."""
        view = target if self.item is None else target[self.item]
        if self.axis is None:
            return view
        return view.narrow(self.axis, self.first, self.source.shape[self.axis])


@dataclass(frozen=True)
class Converted:
    """Stored tensors that become targets through one of transformers' conversions."""

    sources: tuple[tuple[str, StoredTensor], ...]
    dtype: torch.dtype
    first: str
    converter: Any
    model: Any

    def run(self, values: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The targets' values from those of the sources."""
        converter = deepcopy(self.converter)
        for (pattern, source), value in zip(self.sources, values, strict=True):
            # A callable, because that is what the loader itself hands over without threads.
            converter.add_tensor(self.first, source.name, pattern, lambda value=value: value)
        out = converter.convert(self.first, model=self.model, config=self.model.config)
        return {k: v[0] if isinstance(v, list) else v for k, v in out.items()}


@dataclass(frozen=True)
class Group:
    """Targets that are filled together, and how."""

    targets: tuple[ModelTensor, ...]
    steps: tuple[Copied | Converted, ...]


@dataclass(frozen=True)
class PartPlan:
    """All that fills one part.

    Attributes:
        steps: what to read.
        targets: what is filled, with the byte at which each starts in the part's buffer.
        names: every name that a target has in this part of the model.
        size: bytes of the buffer.
    """

    steps: tuple[Copied | Converted, ...]
    targets: Mapping[str, tuple[ModelTensor, int]]
    names: Mapping[str, str]
    size: int


def plan_parts(
    folder: Path, model: Any, blocks: Sequence[str], dtype: torch.dtype, *, fp8: bool = False
) -> tuple[dict[Part, PartPlan], list[str]]:
    """What fills each block, the embedding, the head and the rest of a model.

    Args:
        folder: the checkpoint; only its headers are read.
        model: its skeleton.
        blocks: paths of the block modules.
        dtype: the model's.
        fp8: weights may be float8, with scales beside them.

    Returns:
        the plan of each part, and the names of stored tensors that the model has no use for.

    Raises:
        ModelError: tensors are missing from the checkpoint, or have other shapes.
    """
    names = Names(model, dtype)
    groups, unexpected = _groups(folder, names, fp8)
    group_of = {t.name: group for group in groups for t in group.targets}
    kept = _resolved(folder, names, set(group_of))
    paths = _paths(model, blocks)
    members: dict[Part, dict[str, str]] = {p: {} for p in (*range(len(blocks)), EMBED, HEAD, REST)}
    for name, target in kept.items():
        stems = (name[: dot.start()] for dot in re.finditer(r"\.", name))
        part = next((paths[stem] for stem in stems if stem in paths), REST)
        members[part][name] = target
    return {part: _layout(found, group_of) for part, found in members.items()}, unexpected


def _paths(model: Any, blocks: Sequence[str]) -> dict[str, Part]:
    paths: dict[str, Part] = {path: i for i, path in enumerate(blocks)}
    decoder = language_model(model)
    outer = {
        id(decoder.get_input_embeddings()): EMBED,
        id(decoder.get_output_embeddings()): HEAD,
    }
    for name, module in model.named_modules():
        if id(module) in outer:
            paths[name] = outer[id(module)]
    return paths


def _layout(names: Mapping[str, str], group_of: Mapping[str, Group]) -> PartPlan:
    """Give every target of a part its place; one that has two names is there once."""
    groups = {id(group_of[t]): group_of[t] for t in names.values()}.values()
    targets: dict[str, tuple[ModelTensor, int]] = {}
    size = 0
    for target in (t for group in groups for t in group.targets):
        start = -(-size // _ALIGN) * _ALIGN
        targets[target.name] = (target, start)
        size = start + target.size
    return PartPlan(tuple(s for group in groups for s in group.steps), targets, names, size)


def _resolved(folder: Path, names: Names, there: set[str]) -> dict[str, str]:
    """The target behind each name in the model; names that are tied have one target.

    Raises:
        ModelError: nothing in the checkpoint fills a parameter.
    """
    kept = {name: name for name in names.tensors if name in there}
    for this, that in names.ties().items():
        # Either may be the stored one; where both are, transformers ties them only if equal.
        if this not in there and that in there:
            kept[this] = that
        elif that not in there and this in there:
            kept[that] = this
    for this, that in names.ties().items():
        if this not in kept and that in kept:
            kept[this] = kept[that]
    missing = sorted(n for n in names.tensors if n not in kept and not names.may_miss(n))
    if missing:
        raise ModelError(
            f"the checkpoint in {folder} lacks {len(missing)} tensors of its architecture, first "
            f"{missing[0]}; the config and the weights do not belong together"
        )
    return kept


def _groups(folder: Path, names: Names, fp8: bool) -> tuple[list[Group], list[str]]:
    """Every stored tensor that the model has, by what it fills; and those it does not have."""
    stored = read_checkpoint(folder)
    if fp8:
        stored = weights_of(stored)
    unexpected: list[str] = []
    alone: list[Group] = []
    together: dict[str, list[tuple[str, StoredTensor]]] = {}
    for name in sorted(stored, key=names.order):
        tensor = stored[name]
        target, pattern = names.target(name)
        if target not in names.tensors:
            if not names.may_be_extra(target):
                unexpected.append(name)
            continue
        if pattern is not None:
            together.setdefault(target, []).append((pattern, tensor))
            continue
        wanted = tuple(names.tensors[target].shape)
        _same_shape(folder, name, tensor.shape, wanted)
        made = ModelTensor(target, names.dtype_of(target), wanted)
        alone.append(Group((made,), (Copied(tensor, target),)))
    joined = [_joined(folder, first, members, names) for first, members in together.items()]
    return alone + joined, unexpected


def _joined(
    folder: Path, first: str, members: Sequence[tuple[str, StoredTensor]], names: Names
) -> Group:
    """Tensors of one converter: as slices of its target where it only stacks and joins them."""
    converter = names.converter(members[0][0])
    dtype = names.dtype_of(first)
    conversion = Converted(tuple(members), dtype, first, converter, names.model)
    made = conversion.run(
        [torch.empty(source.shape, dtype=dtype, device="meta") for _, source in members]
    )
    targets = tuple(
        ModelTensor(name, dtype, tuple(value.shape))
        for name, value in made.items()
        if name in names.tensors
    )
    for target in targets:
        _same_shape(folder, target.name, target.shape, tuple(names.tensors[target.name].shape))
    slices = _slices(converter, members, first) if len(targets) == len(made) == 1 else None
    return Group(targets, tuple(slices) if slices else (conversion,))


def _slices(
    converter: Any, members: Sequence[tuple[str, StoredTensor]], target: str
) -> list[Copied] | None:
    """Where each tensor goes in the target; None for a conversion that computes more."""
    kinds = [type(op).__name__ for op in converter.operations]
    if kinds not in (["MergeModulelist"], ["MergeModulelist", "Concatenate"], ["Concatenate"]):
        return None
    stacked, joined = kinds[0] == "MergeModulelist", kinds[-1] == "Concatenate"
    if stacked and converter.operations[0].dim != 0:
        return None
    axis = None
    if joined:
        # Of one item, without the axis along which items are stacked.
        axis = converter.operations[-1].dim - (1 if stacked else 0)
        if axis < 0:
            return None
    by_pattern: dict[str, list[StoredTensor]] = {}
    for pattern, source in members:
        by_pattern.setdefault(pattern, []).append(source)
    out: list[Copied] = []
    first = 0
    for pattern in converter.source_patterns:
        items = by_pattern.get(pattern, [])
        if axis is not None and not stacked:
            for source in items:
                out.append(Copied(source, target, axis=axis, first=first))
                first += source.shape[axis]
            continue
        out += [Copied(s, target, item=k, axis=axis, first=first) for k, s in enumerate(items)]
        if axis is not None and items:
            first += items[0].shape[axis]
    return out


def _same_shape(folder: Path, name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if found != wanted:
        raise ModelError(wrong_shape(name, folder, found, wanted))
