"""Write safetensors checkpoints by copying byte ranges of others.

A new checkpoint is a list of stored extents and of slices of them, so neither dtype nor size
matters.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from isingcut.errors import CheckpointError
from isingcut.models.checkpoint.read import BITS, INDEX, SINGLE, StoredTensor

_CHUNK = 32 * 2**20
_BUFFER = 2**20


@dataclass(frozen=True)
class NewTensor:
    """One tensor to write: the stored bytes, or ``kept`` of its ``count`` slices on one axis."""

    name: str
    source: StoredTensor
    axis: int | None = None
    count: int = 1
    kept: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape after slicing."""
        shape = list(self.source.shape)
        if self.axis is not None:
            shape[self.axis] = shape[self.axis] // self.count * len(self.kept)
        return tuple(shape)

    @property
    def size(self) -> int:
        """Bytes after slicing."""
        if self.axis is None:
            return self.source.size
        return self.source.size // self.count * len(self.kept)


def write_checkpoint(
    folder: Path, tensors: Sequence[NewTensor], max_shard_bytes: int, metadata: Mapping[str, str]
) -> None:
    """Write tensors as one safetensors file, or as shards with an index.

    At most 32 MiB are held in memory, and those only for sliced tensors.

    Args:
        folder: an existing empty folder.
        tensors: what to write, in the order that decides the shards.
        max_shard_bytes: a shard is closed before it would exceed this; one larger tensor gets
            a shard of its own.
        metadata: the header's ``__metadata__``.

    Raises:
        OSError: the disk is full or the folder read-only.
    """
    shards: list[list[NewTensor]] = [[]]
    room = max_shard_bytes
    for tensor in tensors:
        if shards[-1] and tensor.size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= tensor.size
    if len(shards) == 1:
        write_file(folder / SINGLE, shards[0], metadata)
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / file, shard, metadata)
        weight_map.update({tensor.name: file for tensor in shard})
    index = {
        "metadata": {"total_size": sum(tensor.size for tensor in tensors)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_file(path: Path, tensors: Sequence[NewTensor], metadata: Mapping[str, str]) -> None:
    """Write tensors as one safetensors file.

    Args:
        path: the new file, none of those that the tensors are read from.
        metadata: the header's ``__metadata__``.
    """
    # Wide dtypes first, so that every tensor starts at a multiple of its own element size.
    ordered = sorted(tensors, key=lambda t: -BITS[t.source.dtype])
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for tensor in ordered:
        header[tensor.name] = {
            "dtype": tensor.source.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.size],
        }
        offset += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.flush()
        for tensor in ordered:
            if tensor.axis is None:
                source = tensor.source
                copy_bytes(f.fileno(), source.file, source.start, source.size)
            else:
                _write_sliced(f.fileno(), tensor)


def copy_bytes(target: int, file: Path, start: int, size: int) -> None:
    """Append ``size`` bytes of ``file`` from ``start`` to a file descriptor.

    Through one small buffer that stays in the processor's cache: on Linux that is faster than
    `copy_file_range` and `sendfile`, and it works between any two file systems.

    Raises:
        CheckpointError: the file became shorter meanwhile.
    """
    buffer = memoryview(bytearray(min(_BUFFER, size)))
    with file.open("rb", buffering=0) as f:
        f.seek(start)
        left = size
        while left:
            done = f.readinto(buffer[: min(len(buffer), left)])
            if not done:
                raise CheckpointError(f"{file} ended early, {left} bytes before {start + size}")
            _write_all(target, buffer[:done])
            left -= done


def _write_all(target: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(target, view) :]


def _write_sliced(target: int, tensor: NewTensor) -> None:
    """Write the kept slices: rows of bytes seen as (outer, count, width)."""
    source, axis = tensor.source, tensor.axis
    assert axis is not None
    outer = int(np.prod(source.shape[:axis], dtype=np.int64))
    width = source.size // max(outer, 1) // tensor.count
    kept = np.asarray(tensor.kept)
    rows = max(1, _CHUNK // (width * tensor.count))
    with source.file.open("rb") as f:
        f.seek(source.start)
        for first in range(0, outer, rows):
            n = min(rows, outer - first)
            if n == 1 and width * tensor.count > _CHUNK:
                for i in tensor.kept:
                    begin = source.start + (first * tensor.count + i) * width
                    copy_bytes(target, source.file, begin, width)
                continue
            data = np.frombuffer(f.read(n * tensor.count * width), dtype=np.uint8)
            block = data.reshape(n, tensor.count, width)[:, kept]
            _write_all(target, np.ascontiguousarray(block).data.cast("B"))
