"""The header of a GGUF file, read within bounds: its metadata, and where each tensor lies.

The package `gguf` believes every count and length in a file, so that this comes before it.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isingcut.errors import CheckpointError
from isingcut.files.inputs import regular_file

_BLOCK = re.compile(r"^blk\.(\d{1,6})\.(.+)$")
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
# A vocabulary of a quarter million has about a million items: tokens, scores, types and merges.
_MOST_ITEMS = 2**21
_MOST_AXES = 4
_LONGEST_TEXT = 2**24


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: its shape as the file has it (the fastest axis first), and its place.

    Attributes:
        kind: the number of its data type.
        start, size: bytes from the beginning of the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int
    size: int


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says of itself.

    Attributes:
        metadata: by key; of an array its length alone.
        big_endian: the order of its bytes.
    """

    path: Path
    big_endian: bool
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """Its name in llama.cpp.

        Raises:
            CheckpointError: there is none.
        """
        name = self.metadata.get("general.architecture")
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,64}", name):
            raise CheckpointError(
                f"{self.path} has no metadata 'general.architecture' that names an architecture"
            )
        return name

    def number(self, key: str) -> int:
        """A whole number at least 1 of the architecture's own metadata.

        Raises:
            CheckpointError: it is missing or none.
        """
        full = f"{self.architecture}.{key}"
        value = self.metadata.get(full)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(
                f"{self.path} has no metadata {full!r} with a whole number above 0"
            )
        return value

    def blocks(self) -> list[dict[str, GgufTensor]]:
        """The tensors of each block, by their names within it.

        Raises:
            CheckpointError: other blocks than the metadata says, or a block lacks a tensor that
                its like neighbours have.
        """
        count = self.number("block_count")
        found: dict[int, dict[str, GgufTensor]] = {}
        for tensor in self.tensors.values():
            if place := block_of(tensor.name):
                found.setdefault(place[0], {})[place[1]] = tensor
        if len(found) != count or max(found) != count - 1:
            raise CheckpointError(
                f"{self.path} says {count} blocks but has tensors of {len(found)}: damaged or split"
            )
        blocks = [found[i] for i in range(count)]
        self._refuse_incomplete(blocks)
        return blocks

    def _refuse_incomplete(self, blocks: list[dict[str, GgufTensor]]) -> None:
        # The kinds of a hybrid each have tensors that the others lack, so that a block whose
        # tensors are some of another's is no kind of its own.
        kinds = {frozenset(block): i for i, block in reversed(list(enumerate(blocks)))}
        for names, first in sorted(kinds.items(), key=lambda item: item[1]):
            for others, like in kinds.items():
                if names < others:
                    lacking = f"blk.{first}.{min(others - names)}"
                    raise CheckpointError(
                        f"{self.path} lacks the tensor {lacking}, which block {like} has; the "
                        "file is incomplete: get it again"
                    )


def block_of(name: str) -> tuple[int, str] | None:
    """The block that a tensor is in, and its name there; None for one outside all blocks."""
    match = _BLOCK.match(name)
    return None if match is None else (int(match[1]), match[2])


def read_gguf(path: Path) -> GgufHeader:
    """Read the header of a GGUF file; nothing is believed that the file's size contradicts.

    Raises:
        CheckpointError: no plain file, no GGUF file, or a damaged or truncated one.
    """
    import gguf

    size = regular_file(path, "the GGUF file", CheckpointError).st_size
    if size < 24:
        raise CheckpointError(f"{path} is damaged or no GGUF file: it has {size} bytes")
    with path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            cursor = _Cursor(data)
            metadata, infos = cursor.header()
            big_endian = cursor.big_endian
            alignment = metadata.get("general.alignment", 32)
            if not isinstance(alignment, int) or not 0 < alignment <= 2**20:
                raise ValueError(f"an alignment of {alignment!r}")
            begin = -(-cursor.at // alignment) * alignment
            tensors = {}
            for name, shape, kind, offset in infos:
                if name in tensors:
                    raise ValueError(f"the tensor {name!r} is there twice")
                per, wide = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
                if shape and shape[0] % per:
                    raise ValueError(f"the tensor {name!r} does not divide into packed groups")
                tensor = GgufTensor(
                    name, shape, kind, begin + offset, math.prod(shape) // per * wide
                )
                if offset % alignment or tensor.start + tensor.size > size:
                    raise ValueError(
                        f"the tensor {name!r} ends at byte {tensor.start + tensor.size} of {size}"
                    )
                tensors[name] = tensor
        except (ValueError, KeyError, struct.error) as e:
            words = "it ends early" if isinstance(e, struct.error) else " ".join(str(e).split())
            raise CheckpointError(f"{path} is damaged or no GGUF file: {words}") from e
    _refuse_overlap(path, list(tensors.values()))
    return GgufHeader(path, big_endian, metadata, tensors)


def _refuse_overlap(path: Path, tensors: list[GgufTensor]) -> None:
    end, before = 0, ""
    for tensor in sorted(tensors, key=lambda t: t.start):
        if tensor.start < end:
            raise CheckpointError(
                f"{path} is damaged or no GGUF file: the tensors {before!r} and {tensor.name!r} "
                "share bytes"
            )
        end, before = tensor.start + tensor.size, tensor.name


class _Cursor:
    """Reads forward; what lies beyond the end is an error."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self.at, self._order, self._items = data, 0, "<", 0

    @property
    def big_endian(self) -> bool:
        """The order of bytes, known once the header is read."""
        return self._order == ">"

    def header(self) -> tuple[dict[str, Any], list[tuple[str, tuple[int, ...], int, int]]]:
        """Metadata, and (name, shape, kind, offset) of each tensor."""
        if self._data[:4] != b"GGUF":
            raise ValueError("its first four bytes are not 'GGUF'")
        self.at = 4
        version = self._one("I")
        if version & 0xFFFF == 0:
            self._order = ">"
            version = int.from_bytes(version.to_bytes(4, "little"), "big")
        if version not in (2, 3):
            raise ValueError(f"version {version}; expected 2 or 3")
        tensors, keys = self._one("Q"), self._one("Q")
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self._text()
            if key in metadata:
                raise ValueError(f"the metadata {key!r} is there twice")
            metadata[key] = self._value(self._one("I"))
        infos = []
        for _ in range(tensors):
            name, axes = self._text(), self._one("I")
            if axes > _MOST_AXES:
                raise ValueError(f"the tensor {name!r} has {axes} axes")
            shape = tuple(self._one("Q") for _ in range(axes))
            if max(shape, default=0) >= 2**48:
                raise ValueError(f"the tensor {name!r} has an impossible shape")
            infos.append((name, shape, self._one("I"), self._one("Q")))
        return metadata, infos

    def _one(self, code: str) -> Any:
        (value,) = struct.unpack_from(self._order + code, self._data, self.at)
        self.at += struct.calcsize(code)
        return value

    def _text(self) -> str:
        length = self._one("Q")
        if length > min(_LONGEST_TEXT, len(self._data) - self.at):
            raise ValueError(f"a text of {length} bytes")
        self.at += length
        return self._data[self.at - length : self.at].decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._one(_SCALARS[kind])
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            raise ValueError(f"metadata of the unknown type {kind}")
        inner, length = self._one("I"), self._one("Q")
        self._items += length
        if self._items > _MOST_ITEMS:
            raise ValueError(f"lists of more than {_MOST_ITEMS} items")
        if inner in _SCALARS:
            width = struct.calcsize(_SCALARS[inner])
            if length * width > len(self._data) - self.at:
                raise ValueError(f"a list of {length} numbers")
            self.at += length * width
        elif inner == _STRING:
            for _ in range(length):
                self._text()
        else:
            raise ValueError("a list of lists")
        return length
