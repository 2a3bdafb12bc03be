"""Assign stored tensors to the parts of a model, and read parts into a buffer.

Names and conversions (for example, of a list of experts to one tensor) are those of transformers,
so that a streamed block has the same values as after `from_pretrained`.

Files are read, not memory-mapped: mapped pages would stay in the process's resident memory, while a
buffer has a known size.
"""

import re
from collections.abc import Callable, Container, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isingcut.errors import ModelError
from isingcut.formats.architectures.blocks import (
    language_model,
    modules_of,
    stack_modules,
)
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
from isingcut.models.placement import as_parameter
from isingcut.models.replay import EMBED, HEAD, Part

REST = "rest"
"""Part outside the blocks, the embedding and the head: norm, position embeddings, buffers."""
# Alignment of tensors in a buffer, in bytes, for vector instructions and matrix kernels.
_ALIGN = 64


Place = tuple[int | slice, ...]
"""Index of a slice of a tensor; empty for the whole tensor."""


@dataclass(frozen=True, eq=False)
class Step:
    """Stored tensors that together fill tensors of the model (the targets).

    Attributes:
        targets: the targets by name, on the meta device.
        sources: the stored tensors, each with its place in the only target.
        convert: function from the values of the sources to those of the targets; None: the sources
            are copied to their places.
    """

    targets: Mapping[str, Tensor]
    sources: Sequence[tuple[StoredTensor, Place]]
    convert: Callable[[Sequence[Tensor]], Mapping[str, Tensor]] | None = None


def plan_parts(
    folder: Path, stored: Mapping[str, StoredTensor], model: Any, dtype: torch.dtype
) -> tuple[dict[Part, tuple[dict[str, str], list[Step]]], list[str]]:
    """Plan how to fill each block, the embedding, the head and the rest of a model.

    Args:
        folder: folder of the checkpoint, for messages.
        stored: tensors of the checkpoint.
        model: the model without its weights.
        dtype: dtype of the model.

    Returns:
        for each part, the target of each of its names in the model, and the steps that fill the
        targets; and the names of stored tensors that the model does not use.

    Raises:
        ModelError: tensors are missing from the checkpoint, or have other shapes.
    """
    names = Names(model, dtype)
    steps, unexpected = _find_steps(folder, stored, names)
    step_of = {name: step for step in steps for name in step.targets}
    targets = _resolve_names(folder, names, step_of)
    decoder = language_model(model)
    parts: dict[Any, Part] = {
        decoder.get_input_embeddings(): EMBED,
        decoder.get_output_embeddings(): HEAD,
    }
    blocks = enumerate(stack_modules(model))
    parts |= {module: i for i, block in blocks for module in modules_of(block)}
    paths = {path: parts[m] for path, m in model.named_modules() if m in parts}
    members: dict[Part, dict[str, str]] = {p: {} for p in (*parts.values(), REST)}
    for name, target in targets.items():
        stems = (name[: dot.start()] for dot in re.finditer(r"\.", name))
        part = next((paths[stem] for stem in stems if stem in paths), REST)
        members[part][name] = target
    plans = {
        part: (own, list(dict.fromkeys(step_of[target] for target in own.values())))
        for part, own in members.items()
    }
    return plans, unexpected


def _resolve_names(folder: Path, names: Names, there: Container[str]) -> dict[str, str]:
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


def _find_steps(
    folder: Path, stored: Mapping[str, StoredTensor], names: Names
) -> tuple[list[Step], list[str]]:
    """Return the steps that fill the model, and the stored names that it does not use."""
    unexpected: list[str] = []
    steps: list[Step] = []
    together: dict[str, list[tuple[str, StoredTensor]]] = {}
    for name in sorted(stored, key=names.order):
        tensor = stored[name]
        target, pattern = names.target(name)
        if not names.is_known(target):
            unexpected.append(name)
        elif target in names.tensors and pattern is not None:
            together.setdefault(target, []).append((pattern, tensor))
        elif target in names.tensors:
            made = torch.empty(
                tensor.shape, dtype=names.dtype_of(target), device="meta"
            )
            _check_shape(folder, name, made, names.tensors[target])
            steps.append(Step({target: made}, [(tensor, ())]))
    for first, members in together.items():
        steps.append(_join_sources(folder, first, members, names))
    return steps, unexpected


def _join_sources(
    folder: Path, first: str, members: Sequence[tuple[str, StoredTensor]], names: Names
) -> Step:
    """Return the step of one converter: copies to slices of its target if it only stacks and
    concatenates tensors."""
    dtype = names.dtype_of(first)
    convert = partial(_convert, names, first, members)
    made = convert(
        [torch.empty(source.shape, dtype=dtype, device="meta") for _, source in members]
    )
    targets = {
        name: value.to(dtype) for name, value in made.items() if name in names.tensors
    }
    for name, target in targets.items():
        _check_shape(folder, name, target, names.tensors[name])
    if len(targets) == len(made) == 1:
        slices = _find_slices(names.converters[members[0][0]], members)
        if slices is not None:
            return Step(targets, slices)
    return Step(targets, [(source, ()) for _, source in members], convert)


def _convert(
    names: Names,
    first: str,
    members: Sequence[tuple[str, StoredTensor]],
    values: Sequence[Tensor],
) -> dict[str, Tensor]:
    """Compute the values of targets by one of transformers' converters."""
    converter = deepcopy(names.converters[members[0][0]])
    for (pattern, source), value in zip(members, values, strict=True):
        # A callable, which transformers' own loader also passes if it uses no threads.
        converter.add_tensor(first, source.name, pattern, lambda value=value: value)
    out = converter.convert(first, model=names.model, config=names.model.config)
    return {k: v[0] if isinstance(v, list) else v for k, v in out.items()}


def _find_slices(
    converter: Any, members: Sequence[tuple[str, StoredTensor]]
) -> list[tuple[StoredTensor, Place]] | None:
    """Return the place of each tensor, or None unless a conversion only stacks and joins."""
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
    slices: list[tuple[StoredTensor, Place]] = []
    first = 0
    for wanted in converter.source_patterns:
        items = [source for pattern, source in members if pattern == wanted]
        for k, source in enumerate(items):
            place: Place = (k,) if stacked else ()
            if axis is not None:
                end = first + source.shape[axis]
                place += (*[slice(None)] * axis, slice(first, end))
                # The items of one stack begin at the same index.
                if not stacked or source is items[-1]:
                    first = end
            slices.append((source, place))
    return slices


def _check_shape(folder: Path, name: str, stored: Tensor, wanted: Tensor) -> None:
    if stored.shape != wanted.shape:
        raise ModelError(explain_shape(name, folder, stored.shape, wanted.shape))


# Bytes converted at a time: small enough for a cache, large enough for efficient reads.
_STAGE = 4 * 2**20


class Reader:
    """Reader of the stored tensors of one checkpoint.

    Args:
        folder: folder of the checkpoint.
        model: the model without its weights.
        dtype: dtype of the model.

    Attributes:
        parts: the parts of the model.
        unexpected: names of stored tensors that the model does not use.
    """

    def __init__(self, folder: Path, model: nn.Module, dtype: torch.dtype) -> None:
        raw = read_config(folder)
        self.folder = folder
        self._fp8 = fp8_layout(folder, raw) is not None
        self._tile = tile_of(raw)
        self._stored = read_checkpoint(folder)
        self._dtype = dtype
        stored = weights_of(self._stored) if self._fp8 else self._stored
        plans, self.unexpected = plan_parts(folder, stored, model, dtype)
        self.parts = {
            part: StoredPart(part, *plan, self, model) for part, plan in plans.items()
        }

    @torch.no_grad()
    def run(self, step: Step, views: Mapping[str, Tensor]) -> None:
        """Fill the targets of a step, given by name.

        Raises:
            CheckpointError: a file became shorter, or a dtype is not supported.
        """
        if step.convert is None:
            (target,) = step.targets
            for source, place in step.sources:
                self._copy(source, views[target][place])
            return
        dtype = next(iter(step.targets.values())).dtype
        values = [self._value(source, dtype) for source, _ in step.sources]
        for name, value in step.convert(values).items():
            if name in views:
                views[name].copy_(value)

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
        stage = memoryview(bytearray(min(_STAGE, source.size)))
        for first in range(0, source.size, _STAGE):
            data = stage[: source.size - first]
            source.read_into(data, first)
            piece = torch.frombuffer(data, dtype=dtype)
            start = first // dtype.itemsize
            flat[start : start + len(piece)].copy_(
                piece.to(self._dtype) if narrowed else piece
            )

    def _value(self, source: StoredTensor, dtype: torch.dtype) -> Tensor:
        """Read one whole stored tensor, dequantised and converted to ``dtype``."""
        value = torch.empty(source.shape, dtype=dtype)
        self._copy(source, value)
        return value


class StoredPart:
    """One part of one model, for `Buffers`.

    Args:
        names: target of each tensor name in this part of the model; tied names share one target.
        steps: the steps that fill the targets.

    Attributes:
        size: bytes of the part.
        sweeps: number of times that the part was read.
    """

    def __init__(
        self,
        part: Part,
        names: Mapping[str, str],
        steps: Sequence[Step],
        reader: Reader,
        model: nn.Module,
    ) -> None:
        self.part = part
        self.names = names
        self.steps = steps
        self.size = self.sweeps = 0
        self._reader = reader
        # Each target with its first byte in the buffer.
        self._targets: dict[str, tuple[Tensor, int]] = {}
        for name, target in (item for step in steps for item in step.targets.items()):
            start = -(-self.size // _ALIGN) * _ALIGN
            self._targets[name] = target, start
            self.size = start + target.nbytes
        self._homes: list[tuple[dict[str, Any], str, str, Any]] = []
        for name, place in names.items():
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            home: dict[str, Any] = (
                module._parameters if leaf in module._parameters else module._buffers
            )
            # A stored buffer was computed by `build_skeleton` like the others.
            home[leaf] = home[leaf].to("meta")
            self._homes.append((home, leaf, place, home[leaf]))

    def view(self, buffer: Tensor) -> dict[str, Tensor]:
        """Return the targets as views of a buffer, uint8 of at least the part's size."""
        return {
            name: buffer[start : start + target.nbytes]
            .view(target.dtype)
            .view(target.shape)
            for name, (target, start) in self._targets.items()
        }

    def fill(self, buffer: Tensor) -> None:
        """Read the part into a buffer in host memory. The first time, also check its numbers.

        Raises:
            CheckpointError: a file became shorter, a dtype is not supported, or a tensor has NaN
                or infinity.
        """
        views = self.view(buffer)
        for step in self.steps:
            self._reader.run(step, views)
        if not self.sweeps:
            refuse_infinite(views.items(), self._reader.folder)
        self.sweeps += 1

    def install(self, memory: Tensor) -> None:
        """Set the tensors of this part in the model to views of ``memory``."""
        views = self.view(memory)
        for home, leaf, target, empty in self._homes:
            home[leaf] = as_parameter(views[target], empty)

    def remove(self) -> None:
        """Set the tensors of this part in the model to empty ones again."""
        for home, leaf, _, empty in self._homes:
            home[leaf] = empty
