"""A GGUF file as the package `gguf` reads it: its metadata, and the tensors of its blocks.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isingcut.errors import CheckpointError
from isingcut.files.inputs import regular_file
from isingcut.models.loading import one_line

_BLOCK = re.compile(r"^blk\.(\d{1,6})\.(.+)$")


@dataclass(frozen=True, eq=False)
class GgufHeader:
    """What a GGUF file says of itself.

    Attributes:
        reader: gguf's, with its tensors mapped into memory.
        tensors: gguf's, by name.
    """

    path: Path
    reader: Any
    tensors: dict[str, Any]

    def value(self, key: str) -> Any:
        """A value of the metadata; None where there is none."""
        field = self.reader.fields.get(key)
        return None if field is None else field.contents()

    @property
    def big_endian(self) -> bool:
        """The order of its bytes, seen from a little-endian machine."""
        return bool(self.reader.byte_order == "S")

    @property
    def architecture(self) -> str:
        """Its name in llama.cpp.

        Raises:
            CheckpointError: there is none.
        """
        name = self.value("general.architecture")
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
        value = self.value(full)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(
                f"{self.path} has no metadata {full!r} with a whole number above 0"
            )
        return value

    def check_blocks(self) -> int:
        """The number of blocks.

        Raises:
            CheckpointError: the metadata says another one, or a block lacks a tensor that its like
                neighbours have.
        """
        count = self.number("block_count")
        found: dict[int, set[str]] = {}
        for place in filter(None, map(block_of, self.tensors)):
            found.setdefault(place[0], set()).add(place[1])
        if len(found) != count or max(found) != count - 1:
            raise CheckpointError(
                f"{self.path} says {count} blocks but has tensors of {len(found)}: damaged or split"
            )
        # The kinds of a hybrid each have tensors that the others lack, so that a block whose
        # tensors are some of another's is no kind of its own.
        for block, names in sorted(found.items()):
            for like, others in sorted(found.items()):
                if names < others:
                    raise CheckpointError(
                        f"{self.path} lacks the tensor blk.{block}.{min(others - names)}, which "
                        f"block {like} has; the file is incomplete: get it again"
                    )
        return count


def block_of(name: str) -> tuple[int, str] | None:
    """The block that a tensor is in, and its name there; None for one outside all blocks."""
    match = _BLOCK.match(name)
    return None if match is None else (int(match[1]), match[2])


def read_gguf(path: Path) -> GgufHeader:
    """Read a GGUF file's metadata, and map its tensors.

    Raises:
        CheckpointError: no plain file, no GGUF file, or a damaged or truncated one.
    """
    from gguf.gguf_reader import GGUFReader

    class Reader(GGUFReader):
        """Believes no length that the file is too short for."""

        def _get(self, offset: int, dtype: Any, count: int = 1, *rest: Any, **more: Any) -> Any:
            found = super()._get(offset, dtype, count, *rest, **more)
            if len(found) < count:
                raise ValueError("it ends early")
            return found

    regular_file(path, "the GGUF file", CheckpointError)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader = Reader(path)
    except Exception as error:
        # Its counts and lengths may be any numbers.
        words = one_line(error)
        raise CheckpointError(f"{path} is damaged or no GGUF file: {words}") from error
    return GgufHeader(path, reader, {tensor.name: tensor for tensor in reader.tensors})
