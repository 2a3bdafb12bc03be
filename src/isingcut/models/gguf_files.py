"""A GGUF file as the package `gguf` reads it: its metadata, and the tensors of its blocks.

Converted, it is an ordinary bfloat16 Hugging Face folder in the cache.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isingcut.errors import ArchitectureError, CheckpointError, InputError, ModelError
from isingcut.files.inputs import regular_file, user_path
from isingcut.files.ownership import foreign_in
from isingcut.files.writing import atomic_folder, lock_place
from isingcut.models.fit import limit_structure, most_numbers
from isingcut.models.loading import (
    catch_errors,
    one_line,
    quiet_transformers,
    refuse_incomplete,
    refuse_infinite,
)
from isingcut.models.transformers_private import get_unpacking

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

    @property
    def mtp_layers(self) -> int:
        """Number of layers for multi-token prediction, which `block_count` includes."""
        found = self.value(f"{self.architecture}.nextn_predict_layers")
        return found if isinstance(found, int) and found < self.number("block_count") else 0

    def check_blocks(self) -> int:
        """The number of blocks, without the layers for multi-token prediction behind them.

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
        for extra in range(count - self.mtp_layers, count):
            del found[extra]
        # The kinds of a hybrid each have tensors that the others lack, so that a block whose
        # tensors are some of another's is no kind of its own.
        for block, names in sorted(found.items()):
            for like, others in sorted(found.items()):
                if names < others:
                    raise CheckpointError(
                        f"{self.path} lacks the tensor blk.{block}.{min(others - names)}, which "
                        f"block {like} has; the file is incomplete: get it again"
                    )
        return count - self.mtp_layers


def block_of(name: str) -> tuple[int, str] | None:
    """The block that a tensor is in, and its name there; None for one outside all blocks."""
    match = _BLOCK.match(name)
    return None if match is None else (int(match[1]), match[2])


PACKED = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
"""The quantised types that the package `gguf` can pack, the finest first."""
PLAIN_TYPES = ("F32", "F16", "BF16")
_STAYS = re.compile(r"norm|bias|conv|router|\bgate\.|gate_inp|wpe|position|A_log|ssm_a")


def packed_type(
    name: str, shape: Sequence[int], own: Any, wanted: str, *, inside: bool, new: bool = False
) -> Any:
    """Return the type of a tensor in a file whose blocks are packed as ``wanted``.

    Outside the blocks that is Q8_0 where ``wanted`` is smaller. Norms, biases, routers and
    convolutions keep their type, and no tensor gets one of more bits than it has.

    Args:
        name: in a GGUF file or in a checkpoint.
        shape: rows last.
        own: its type.
        wanted: one of `PACKED`; "": its own.
        inside: whether it is in a block.
        new: it has new values; a type that cannot be packed then gives way to the next smaller.

    Raises:
        ArchitectureError: there is no smaller type.
    """
    import gguf

    def bits(kind: Any) -> float:
        numbers, size = gguf.GGML_QUANT_SIZES[kind]
        return float(8 * size / numbers)

    types = [gguf.GGMLQuantizationType[kind] for kind in PACKED]
    if len(shape) < 2 or shape[-1] % 32 or _STAYS.search(name):
        return own
    target = gguf.GGMLQuantizationType[wanted if inside else PACKED[0]] if wanted else own
    if bits(target) < bits(own):
        return target
    if not new or own in types or own.name in PLAIN_TYPES:
        return own
    for kind in types:
        if bits(kind) <= bits(own):
            return kind
    raise ArchitectureError(
        f"{name} is of type {own.name}, smaller than all that isingcut can pack "
        f"({', '.join(PACKED)}); use a file of a larger type, or the checkpoint"
    )


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


def gguf_cache() -> Path:
    """Where converted files are kept, by their hash: in `$ISINGCUT_CACHE`, else the platform's.

    Folders of the name ``gguf`` are of versions that completed a file with random numbers.
    """
    home = Path.home()
    if override := os.environ.get("ISINGCUT_CACHE"):
        return user_path(override) / "gguf-2"
    if os.name == "nt":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif (home / "Library" / "Caches").is_dir():
        base = home / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / "isingcut" / "gguf-2"


def convert_file(path: Path) -> Path:
    """The folder of the converted file, made on first use; it is named after the content's hash.

    Every weight is unpacked to bfloat16: a cut of a quantised file is a plain checkpoint.

    Raises:
        ModelError: not a GGUF file, one that lacks a tensor of its architecture, or of an
            architecture transformers cannot convert; or the folder was changed since.
        CheckpointError: a damaged or truncated file.
    """
    regular_file(path, "the GGUF file", ModelError)
    with path.open("rb") as f:
        if f.read(4) != b"GGUF":
            raise ModelError(f"{path} is not a GGUF file: its first four bytes are not 'GGUF'")
        f.seek(0)
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    target = gguf_cache() / digest
    if target.is_dir():
        return _check_unchanged(target, path)
    _count_numbers(path)
    try:
        # One at a time: what a killed one left has the size of a model, and is cleared.
        with lock_place(target.parent, inside=True, wait=True):
            if target.is_dir():
                # Another process has made it meanwhile.
                return _check_unchanged(target, path)
            # Overwriting, because a file system may have no locks.
            with atomic_folder(target, overwrite=True) as temporary:
                unpack_gguf(path, temporary)
    except InputError as e:
        why = str(getattr(e.__cause__, "strerror", None) or e).lower()
        raise ModelError(
            f"the converted model cannot be stored in {target.parent}: {why}; set "
            "ISINGCUT_CACHE to a writable folder with enough space"
        ) from e
    return target


def _check_unchanged(target: Path, path: Path) -> Path:
    """The folder of the converted file, once it is known to be as it was made."""
    changed = foreign_in(target)
    if changed is not None:
        raise ModelError(
            f"the model converted from {path.name} was changed: {changed}; delete "
            f"{target} and run again"
        )
    return target


def _count_numbers(path: Path) -> int:
    """How many numbers the file's tensors hold, once its header and its blocks are whole."""
    header = read_gguf(path)
    header.check_blocks()
    return sum(tensor.n_elements for tensor in header.tensors.values())


def unpack_gguf(path: Path, folder: Path) -> None:
    """Write a GGUF file as a Hugging Face checkpoint in bfloat16.

    Raises:
        ModelError, CheckpointError: as `convert_file`.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loader: Any = AutoModelForCausalLM
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    with (
        catch_errors(f"{path.name} with transformers"),
        # One of its progress bars has no switch.
        contextlib.redirect_stderr(io.StringIO()),
        limit_structure(most_numbers(_count_numbers(path)), path.name),
    ):
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model, found = loader.from_pretrained(
            **source,
            **get_unpacking(),
            dtype=torch.bfloat16,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    refuse_incomplete(found, path)
    refuse_infinite(model.named_parameters(), path)
    # With a quantiser attached, `save_pretrained` refuses.
    for trace in ("hf_quantizer", "quantization_method", "is_quantized"):
        if hasattr(model, trace):
            delattr(model, trace)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
