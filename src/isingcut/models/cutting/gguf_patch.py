"""A GGUF file and its checkpoint: whether they are of one model, and a patch's layers in the file.

Weights may be packed, permuted, split or joined there; norms are stored as they are, in plain
numbers. The layers of a patched checkpoint are packed again as they were, and the error measured.

The package gguf packs plain numbers, Q8_0, Q4_0, Q5_0 and the like. What it only unpacks (the K
and the I types) becomes Q8_0, which is finer than any of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isingcut.errors import ArchitectureError, InputError
from isingcut.models.architectures.surgery import depth, renumbering, written_out
from isingcut.models.checkpoint.gguf_header import GgufHeader, block_of
from isingcut.models.checkpoint.read import PLAIN, StoredTensor, read_checkpoint, read_config
from isingcut.models.fit import block_prefix
from isingcut.models.fp8 import dequantise, read_tensor, scale_of, tile_of

_WIDTHS = ("hidden_size", "n_embd", "d_model")
# What a checkpoint may hold and a GGUF need not: tables that llama.cpp computes itself.
_COMPUTED = re.compile(r"\.(attn_rot_embd|rope_freqs)\b")


def check_same_model(header: GgufHeader, model: Path) -> None:
    """Refuse a GGUF file that was not made from a checkpoint, as far as it can be known.

    Args:
        header: of the GGUF file.
        model: the checkpoint's folder.

    Raises:
        InputError: another number of blocks, another width, or norms of other values.
        CheckpointError: either is damaged.
    """
    text = written_out(read_config(model))
    count = header.check_blocks()
    _same(header, "blocks", count, depth(text))
    width = next((text[k] for k in _WIDTHS if isinstance(text.get(k), int)), None)
    if width is not None:
        _same(header, "numbers in its stream", header.number("embedding_length"), width)
    for name, stored in names_in_gguf(header, count, read_checkpoint(model)).items():
        tensor = header.tensors.get(name)
        if tensor is not None and name.endswith("norm.weight") and not _alike(tensor, stored):
            raise InputError(
                f"{header.path} is of another model: its tensor {name} has other values than the "
                "run's model; give the GGUF that was made from it"
            )


def _same(header: GgufHeader, what: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise InputError(
            f"{header.path} is of another model: it has {found} {what}, the run's model {wanted}"
        )


def names_in_gguf(
    header: GgufHeader, count: int, stored: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """The checkpoint's tensors by the names that llama.cpp has for them, where it has one."""
    import gguf

    architecture = next(
        (a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == header.architecture), None
    )
    if architecture is None:
        return {}
    known = gguf.get_tensor_name_map(architecture, count)
    found = {}
    for name, tensor in stored.items():
        theirs = known.get_name(name, try_suffixes=(".weight", ".bias"))
        if theirs is not None and not _COMPUTED.search(theirs):
            found[str(theirs)] = tensor
    return found


def _alike(tensor: Any, stored: StoredTensor) -> bool:
    """Whether plain numbers are equal to bfloat16's rounding; some conversions add one to norms."""
    if stored.dtype not in PLAIN or not np.issubdtype(tensor.data.dtype, np.floating):
        return True
    ours, theirs = tensor.data.flatten(), read_tensor(stored).double().flatten().numpy()
    same = ours.size == theirs.size
    return same and any(np.allclose(ours, theirs + m, rtol=0.02, atol=1e-3) for m in (0.0, 1.0))


_Turn = Callable[[NDArray[np.float32]], NDArray[np.float32]]
_SAME = 0.35
"""Relative difference of a tensor and its packing, at most: of two bits a weight it is 0.3."""


@dataclass(frozen=True, eq=False)
class Changed:
    """A tensor whose values a patch has changed.

    Attributes:
        name: in the original, for messages.
        before: what the original holds, float32, to find how the GGUF file lays it out.
        after: what the patched checkpoint holds.
    """

    name: str
    before: NDArray[np.float32]
    after: NDArray[np.float32]


@dataclass(frozen=True)
class Repacked:
    """A tensor of the cut GGUF file that was packed again.

    Attributes:
        name: in the cut file.
        was: its type in the original file.
        kind: its type now.
        error: relative difference to the patched checkpoint's values.
    """

    name: str
    was: str
    kind: str
    error: float


def changed_tensors(
    header: GgufHeader,
    original: Path,
    patched: Path,
    removed: Sequence[int],
    layers: Sequence[tuple[int, str]],
) -> dict[str, Changed]:
    """What a patch has changed, by the names of the original's GGUF file.

    Args:
        header: of that file.
        original: the checkpoint that was cut.
        patched: the cut and patched checkpoint.
        layers: the patched ones, each a block of the original and a path inside it.

    Raises:
        ArchitectureError: the file has no tensor for one of them.
    """
    sides = [_Side(original), _Side(patched)]
    mapping = renumbering(sides[0].count, removed)
    known = names_in_gguf(header, sides[0].count, sides[0].stored)
    theirs = {tensor.name: name for name, tensor in known.items()}
    found = {}
    for block, path in layers:
        for leaf in ("weight", "bias"):
            old = f"{sides[0].prefix}{block}.{path}.{leaf}"
            new = f"{sides[1].prefix}{mapping[block]}.{path}.{leaf}"
            if new not in sides[1].stored:
                continue
            name = theirs.get(old)
            if name is None or name not in header.tensors:
                raise ArchitectureError(_cannot(header.path, old))
            found[name] = Changed(old, sides[0].values(old), sides[1].values(new))
    return found


class _Side:
    def __init__(self, folder: Path) -> None:
        self._config = read_config(folder)
        self.stored: Mapping[str, StoredTensor] = read_checkpoint(folder)
        self.count = depth(written_out(self._config))
        self.prefix = block_prefix(self.stored.values(), self.count)

    def values(self, name: str) -> NDArray[np.float32]:
        tensor = self.stored[name]
        value = read_tensor(tensor)
        if tensor.dtype.startswith("F8_"):
            scale = read_tensor(scale_of(name, self.stored))
            value = dequantise(value, scale, tile_of(self._config))
        found: NDArray[np.float32] = value.float().numpy()
        return found


def laid_out(path: Path, tensor: Any, changed: Changed) -> NDArray[np.float32]:
    """The changed values as a GGUF file lays them out: as they are, turned, or, as llama.cpp has
    queries and keys of Llama, with the two halves of each head's rows interleaved.

    Args:
        path: the file, for messages.
        tensor: as gguf's reader gives it, with the values before.

    Raises:
        ArchitectureError: the file holds other numbers, or the same in another order.
    """
    try:
        there = _unpacked(tensor)
    except NotImplementedError as error:
        raise ArchitectureError(_cannot(path, changed.name)) from error
    turns: list[_Turn] = [lambda x: x, np.transpose, *_interleaved(changed.before)]
    for turn in turns:
        before, after = turn(changed.before), turn(changed.after)
        if before.shape == there.shape and _difference(there, before) <= _SAME:
            return np.ascontiguousarray(after)
    raise ArchitectureError(_cannot(path, changed.name))


def _interleaved(values: NDArray[np.float32]) -> Iterator[_Turn]:
    """For every number of heads that the rows can be."""
    rows = len(values)
    for size in range(rows // 2, 0, -1):
        if rows % (2 * size) == 0:
            yield partial(_interleave, size=size)


def _interleave(values: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    halves = values.reshape(-1, 2, size, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def pack(values: NDArray[np.float32], kind: Any) -> tuple[Any, Any]:
    """Values as a GGUF type, or as Q8_0 where the package gguf does not pack that; and the type."""
    import gguf

    try:
        return gguf.quants.quantize(values, kind), kind
    except NotImplementedError:
        kind = gguf.GGMLQuantizationType.Q8_0
        return gguf.quants.quantize(values, kind), kind


def repacked(
    source: Path, out: Path, changed: Mapping[str, Changed], removed: Sequence[int]
) -> list[Repacked]:
    """How near the tensors of a cut file are to the patched checkpoint.

    Args:
        source, out: the GGUF file before and after.
        changed: tensors by their names in ``source``.
    """
    import gguf

    def kept(name: str) -> str:
        place = block_of(name)
        assert place is not None
        block, rest = place
        return f"blk.{block - sum(i < block for i in removed)}.{rest}"

    before = {t.name: t for t in gguf.GGUFReader(source).tensors}
    after = {t.name: t for t in gguf.GGUFReader(out).tensors}
    found = []
    for old, values in changed.items():
        was, now = before[old], after[kept(old)]
        wanted = laid_out(source, was, values)
        error = _difference(_unpacked(now), wanted)
        found.append(Repacked(now.name, was.tensor_type.name, now.tensor_type.name, error))
    return found


def _unpacked(tensor: Any) -> NDArray[np.float32]:
    import gguf

    found: NDArray[np.float32] = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return found


def _difference(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    size = float(np.linalg.norm(wanted.astype(np.float64)))
    return float(np.linalg.norm(found.astype(np.float64) - wanted)) / (size or 1.0)


def _cannot(path: Path, name: str) -> str:
    return (
        f"{path} does not hold {name} as the checkpoint does, so that the patch cannot be put into "
        "it; convert the patched checkpoint instead, or cut without a patch (--patch none)"
    )
