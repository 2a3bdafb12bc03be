"""Read and write safetensors checkpoints by their headers, without decoding tensors.

A tensor is a named range of bytes. A new checkpoint is a list of stored ranges and of slices of
them, for any dtype and size.

Format: https://github.com/huggingface/safetensors#format.
"""

import json
import math
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open

from isingcut.errors import CheckpointError, one_line
from isingcut.files.inputs import load_json, parse_json, regular_file

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEADER_LIMIT = 100_000_000
"""Largest header of a safetensors file in bytes; this is the limit of the safetensors library."""
_OTHERS = {".bin", ".ckpt", ".gguf", ".pt", ".pth", ".safetensors"}
PLAIN = ("F64", "F32", "F16", "BF16")
"""Dtypes of plain floating-point weights."""


@dataclass(frozen=True)
class StoredTensor:
    """Dtype, shape and byte range of one tensor in a file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def packed(self) -> bool:
        """Whether an element may contain several weights."""
        return not self.dtype.startswith(("F", "BF")) or self.size < math.prod(
            self.shape
        )

    @property
    def most_numbers(self) -> int:
        """Largest number of weights in the tensor: its elements or, if packed, eight per byte."""
        return 8 * self.size if self.packed else math.prod(self.shape)

    def data(self) -> bytearray:
        """Read the bytes of the tensor."""
        content = bytearray(self.size)
        self.read_into(memoryview(content))
        return content

    def read_into(self, buffer: memoryview, first: int = 0) -> None:
        """Fill a buffer with the tensor's bytes, starting at its byte ``first``.

        Raises:
            CheckpointError: the file became shorter.
        """
        with self.file.open("rb") as f:
            f.seek(self.start + first)
            if f.readinto(buffer) != len(buffer):
                raise CheckpointError(f"{self.file} ended early, inside {self.name!r}")


@dataclass(frozen=True)
class TensorInMemory(StoredTensor):
    """A stored tensor with new bytes, which are in memory."""

    content: memoryview

    def read_into(self, buffer: memoryview, first: int = 0) -> None:
        buffer[:] = self.content[first : first + len(buffer)]


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """Read a configuration of a checkpoint folder.

    Raises:
        CheckpointError: the folder or file does not exist, or the file is not a JSON object.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"the model's folder {folder} does not exist; give its new place, or download the "
            "model again"
        )
    path = find_contained(folder, name)
    config = load_json(path, "the model's config", CheckpointError, infinite=True)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return config


def write_object(path: Path, content: Any) -> None:
    """Write a JSON object of a checkpoint folder."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_checkpoint(folder: Path) -> dict[str, StoredTensor]:
    """Read all tensors of a checkpoint folder, in file order, from the headers alone.

    Args:
        folder: folder with ``model.safetensors``, or with ``model.safetensors.index.json`` and its
            shards; the single file wins, as in transformers.

    Raises:
        CheckpointError: there are no safetensors, or files are damaged, missing, outside the
            folder, or contradict the index.
    """
    files = weight_files(folder)
    if not files:
        raise CheckpointError(explain_no_weights(folder))
    tensors = {tensor.name: tensor for file in files for tensor in read_header(file)}
    weight_map = {} if files[0].name == SINGLE else read_index(folder)
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file.name != shard:
            where = tensors[name].file.name if name in tensors else "no shard"
            raise CheckpointError(
                f"{INDEX} says that tensor {name!r} is in {shard}, but it is in {where}: "
                "the checkpoint is incomplete, download it again"
            )
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint, sorted; empty if there are none.

    A single file wins over an index, as in transformers.

    Raises:
        CheckpointError: the index is damaged or names a missing shard, or a file is outside the
            folder or not a regular file.
    """
    if os.path.lexists(folder / SINGLE):
        return [find_contained(folder, SINGLE)]
    if not os.path.lexists(folder / INDEX):
        return []
    names = sorted(set(read_index(folder).values()))
    missing = [n for n in names if _is_plain(n) and not os.path.lexists(folder / n)]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the {len(names)} shards its index names, first "
            f"{missing[0]}; complete the download"
        )
    return [find_contained(folder, n) for n in names]


def explain_no_weights(folder: Path) -> str:
    """Explain which weights a folder has instead of safetensors, and what to do."""
    others = sorted(p.name for p in folder.iterdir() if p.suffix in _OTHERS)
    there = f"only {', '.join(others[:3])}" if others else "no weights"
    return (
        f"{folder} has {there}; expected {SINGLE} or {INDEX}, because pickle weights can run code: "
        "convert it with transformers, from_pretrained(...).save_pretrained(...)"
    )


def read_index(folder: Path) -> dict[str, str]:
    """Return the file of each tensor of a sharded checkpoint.

    Raises:
        CheckpointError: the index is damaged.
    """
    index = load_json(
        find_contained(folder, INDEX), "the safetensors index", CheckpointError
    )
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{folder / INDEX} has no 'weight_map' of tensor names to files"
        )
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise CheckpointError(
                f"{INDEX} maps tensor {name!r} to {file!r}, not to a file name"
            )
    return weight_map


def find_contained(folder: Path, name: str) -> Path:
    """Return the path of ``name`` in ``folder`` after checking that the file is really there.

    A link may lead inside the folder, or into the ``blobs`` of a Hugging Face cache, in which every
    file is a link. A link to any other place could copy an unrelated file into the output.

    Raises:
        CheckpointError: the file is missing, outside the folder, or not a regular file.
    """
    if not all(map(_is_plain, name.split("/"))):
        raise CheckpointError(
            f"the file name {name!r} leaves the checkpoint folder {folder}; expected a plain name"
        )
    path = folder / name
    try:
        real = path.resolve(strict=True)
        mode = real.stat().st_mode
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is missing or a broken link; download the checkpoint again"
        ) from error
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path} is not a regular file")
    home = folder.resolve()
    cached = home.parent.name == "snapshots"
    if not real.is_relative_to(home.parent.parent if cached else home):
        raise CheckpointError(
            f"{path} is a link to {real}, outside the checkpoint; put the file itself there"
        )
    return path


def _is_plain(name: str) -> bool:
    return name not in {"", ".", ".."} and not any(c in name for c in "/\\\0")


def read_header(path: Path) -> list[StoredTensor]:
    """Read the tensors of one safetensors file, in the order of their bytes.

    Raises:
        CheckpointError: the file is damaged, or not a safetensors file.
    """
    regular_file(path, "the weights file", CheckpointError)
    try:
        # Opening it checks every dtype, shape and offset against the size of the file.
        with safe_open(path, "numpy"), path.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            header = parse_json(f.read(length))
        header.pop("__metadata__", None)
        tensors = []
        for name, entry in header.items():
            dtype = entry["dtype"]
            start, end = entry["data_offsets"]
            place = 8 + length + start, end - start
            tensors.append(
                StoredTensor(name, path, dtype, tuple(entry["shape"]), *place)
            )
    except (SafetensorError, OSError, ValueError) as error:
        words = (
            f"{path} is damaged, truncated or not a safetensors file: {one_line(error)}"
        )
        raise CheckpointError(f"{words}; download it again") from error
    return sorted(tensors, key=lambda t: (t.start, t.size))


# On Linux, pieces that fit a CPU's cache are faster than `copy_file_range` and `sendfile`.
_CHUNK = 4 * 2**20


@dataclass(frozen=True)
class NewTensor:
    """Tensor to write: the stored bytes, or the ``kept`` ones of ``count`` slices on one axis, or
    zeros of the same form."""

    name: str
    source: StoredTensor
    axis: int | None = None
    count: int = 1
    kept: tuple[int, ...] = (0,)
    zero: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape after slicing."""
        shape = list(self.source.shape)
        if self.axis is not None:
            shape[self.axis] = shape[self.axis] // self.count * len(self.kept)
        return tuple(shape)

    @property
    def size(self) -> int:
        """Number of bytes after slicing."""
        return self.source.size // self.count * len(self.kept)


def write_checkpoint(
    folder: Path, tensors: Sequence[NewTensor], max_shard_bytes: int = 5 * 2**30
) -> None:
    """Write tensors as one safetensors file, or as shards with an index.

    Args:
        folder: an existing empty folder.
        tensors: tensors to write; their order decides the shards.
        max_shard_bytes: largest size of the tensors in one shard; a larger tensor gets a shard of
            its own.

    Raises:
        OSError: the disk is full or the folder read-only.
    """
    named = {tensor.name: tensor for tensor in tensors}
    split: Any = split_state_dict_into_shards_factory(
        named,
        get_storage_size=lambda tensor: tensor.size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    for file, names in split.filename_to_tensors.items():
        write_file(folder / file, [named[name] for name in names])
    if split.is_sharded:
        weight_map = dict(sorted(split.tensor_to_filename.items()))
        index = {"metadata": split.metadata, "weight_map": weight_map}
        write_object(folder / INDEX, index)


def write_file(path: Path, tensors: Sequence[NewTensor]) -> None:
    """Write tensors as one safetensors file; it must not be a file that they are read from."""
    # Wide dtypes first, so that every tensor starts at a multiple of its own element size.
    ordered = sorted(
        tensors, key=lambda t: -(t.source.size // max(1, math.prod(t.source.shape)))
    )
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
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
        for tensor in ordered:
            source = tensor.source
            # Bytes are viewed as rows of ``count`` slices; rows of a whole tensor are its bytes.
            whole = tensor.axis is None
            outer = source.size if whole else math.prod(source.shape[: tensor.axis])
            row = source.size // max(outer, 1)
            rows = max(1, _CHUNK // max(row, 1))
            data = np.empty((min(rows, outer), tensor.count, row // tensor.count), "u1")
            for first in range(0, outer, rows):
                piece = data[: outer - first]
                if tensor.zero:
                    piece[:] = 0
                else:
                    source.read_into(piece.reshape(-1).data, first * row)
                kept = piece if whole else piece[:, list(tensor.kept)]
                f.write(np.ascontiguousarray(kept).data)
