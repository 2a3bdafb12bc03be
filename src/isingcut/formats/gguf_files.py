"""Read GGUF files with the package `gguf`: metadata and tensors of the blocks.

`convert_file` makes an ordinary bfloat16 Hugging Face folder of a file, in the cache.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import contextlib
import io
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isingcut.console.progress import Progress, silent
from isingcut.errors import ArchitectureError, CheckpointError, InputError, ModelError
from isingcut.files.inputs import regular_file, user_path
from isingcut.files.ownership import file_sha256, foreign_in
from isingcut.files.writing import atomic_folder, lock_place
from isingcut.formats.checkpoints import limit_structure
from isingcut.formats.libraries import (
    catch_errors,
    convert_errors,
    quiet_transformers,
    refuse_incomplete,
    refuse_infinite,
)
from isingcut.formats.transformers_private import get_unpacking

_BLOCK = re.compile(r"^blk\.(\d{1,6})\.(.+)$")


@dataclass(frozen=True, eq=False)
class GgufHeader:
    """Header of a GGUF file: its metadata and tensors.

    Attributes:
        reader: reader of the package `gguf`, with memory-mapped tensors.
        tensors: tensors of the reader, by name.
    """

    path: Path
    reader: Any
    tensors: dict[str, Any]

    def value(self, key: str) -> Any:
        """Return a value of the metadata; None if the key is missing."""
        field = self.reader.fields.get(key)
        return None if field is None else field.contents()

    @property
    def architecture(self) -> str:
        """Name of the architecture in llama.cpp.

        Raises:
            CheckpointError: the metadata has no valid name.
        """
        name = self.value("general.architecture")
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,64}", name):
            raise CheckpointError(
                f"{self.path} has no metadata 'general.architecture' that names an architecture"
            )
        return name

    def number(self, key: str) -> int:
        """Return a whole number of at least 1 from the architecture's own metadata.

        Raises:
            CheckpointError: the value is missing or not such a number.
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
        layers = self.value(f"{self.architecture}.nextn_predict_layers")
        valid = isinstance(layers, int) and layers < self.number("block_count")
        return layers if valid else 0

    def check_blocks(self) -> int:
        """Return the number of blocks, without the layers for multi-token prediction after them.

        Raises:
            CheckpointError: the metadata has another number, or a block lacks a tensor that blocks
                of its kind have.
        """
        count = self.number("block_count")
        blocks: dict[int, set[str]] = {}
        for place in filter(None, map(block_of, self.tensors)):
            blocks.setdefault(place[0], set()).add(place[1])
        if len(blocks) != count or max(blocks) != count - 1:
            raise CheckpointError(
                f"{self.path} says {count} blocks but has tensors of {len(blocks)}: damaged or "
                "split"
            )
        for extra in range(count - self.mtp_layers, count):
            del blocks[extra]
        # In a hybrid, each kind of block has tensors that other kinds lack. So a block that has
        # only some of another block's tensors is incomplete.
        for block, names in sorted(blocks.items()):
            for like, others in sorted(blocks.items()):
                if names < others:
                    raise CheckpointError(
                        f"{self.path} lacks the tensor blk.{block}.{min(others - names)}, which "
                        f"block {like} has; the file is incomplete: get it again"
                    )
        return count - self.mtp_layers


def block_of(name: str) -> tuple[int, str] | None:
    """Return a tensor's block and its name in the block; None for a tensor outside all blocks."""
    match = _BLOCK.match(name)
    return None if match is None else (int(match[1]), match[2])


PACKED = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
"""Quantised types that the package `gguf` can pack, the finest first."""
PLAIN_TYPES = ("F32", "F16", "BF16")
_STAYS = re.compile(r"norm|bias|conv|router|\bgate\.|gate_inp|wpe|position|A_log|ssm_a")


def packed_type(
    name: str,
    shape: Sequence[int],
    own: Any,
    wanted: str,
    *,
    inside: bool,
    new: bool = False,
) -> Any:
    """Return the type of a tensor in a file whose blocks are packed as ``wanted``.

    Outside the blocks, the type is Q8_0. Norms, biases, routers, convolutions and tensors with rows
    of no multiple of 32 keep their type. No tensor gets a type with more bits than its own.

    Args:
        name: name of the tensor in a GGUF file or in a checkpoint.
        shape: shape of the tensor, with the length of a row last.
        own: its current type.
        wanted: one of `PACKED`; "" keeps the current type.
        inside: whether the tensor is in a block.
        new: whether it has new values; if its type cannot be packed, the next smaller one is used.

    Raises:
        ArchitectureError: no type that can be packed is as small.
    """
    import gguf

    def bits(kind: Any) -> float:
        numbers, size = gguf.GGML_QUANT_SIZES[kind]
        return float(8 * size / numbers)

    types = [gguf.GGMLQuantizationType[kind] for kind in PACKED]
    if len(shape) < 2 or shape[-1] % 32 or _STAYS.search(name):
        return own
    target = (
        gguf.GGMLQuantizationType[wanted if inside else PACKED[0]] if wanted else own
    )
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
        CheckpointError: not a regular file, not a GGUF file, or a damaged or truncated one.
    """
    from gguf.gguf_reader import GGUFReader

    class Reader(GGUFReader):
        """Reader that raises an error for lengths beyond the end of the file."""

        def _get(
            self, offset: int, dtype: Any, count: int = 1, *rest: Any, **more: Any
        ) -> Any:
            values = super()._get(offset, dtype, count, *rest, **more)
            if len(values) < count:
                raise ValueError("it ends early")
            return values

    regular_file(path, "the GGUF file", CheckpointError)
    # Counts and lengths in a damaged file may be any numbers.
    damaged = convert_errors(CheckpointError, f"{path} is damaged or no GGUF file")
    with damaged, warnings.catch_warnings(action="ignore"):
        reader = Reader(path)
    return GgufHeader(path, reader, {tensor.name: tensor for tensor in reader.tensors})


def cache_folder(name: str) -> Path:
    """Return a folder of the cache, in `$ISINGCUT_CACHE` or else in that of the hub."""
    from huggingface_hub.constants import HF_ASSETS_CACHE

    own = os.environ.get("ISINGCUT_CACHE")
    return user_path(own or f"{HF_ASSETS_CACHE}/isingcut") / name


def convert_file(path: Path, progress: Progress = silent) -> Path:
    """Convert a GGUF file on first use; return the folder, which is named by the content's hash.

    Every weight is dequantised to bfloat16, so a cut of a quantised file is a plain checkpoint.

    Raises:
        ModelError: the file is not a GGUF file, lacks a tensor of its architecture, or has an
            architecture that transformers cannot convert; or the folder was changed since.
        CheckpointError: the file is damaged or truncated.
    """
    target = cache_folder("gguf") / file_sha256(path, progress)
    try:
        if not target.is_dir():
            # One process at a time. The lock deletes the large leftovers of a killed process.
            with lock_place(target.parent, inside=True, wait=True):
                if not target.is_dir():
                    # Overwrite, because a file system may have no locks.
                    with atomic_folder(target, overwrite=True) as temporary:
                        unpack_gguf(path, temporary, progress)
    except InputError as e:
        why = str(getattr(e.__cause__, "strerror", None) or e).lower()
        raise ModelError(
            f"the converted model cannot be stored in {target.parent}: {why}; set "
            "ISINGCUT_CACHE to a writable folder with enough space"
        ) from e
    changed = foreign_in(target)
    if changed is not None:
        raise ModelError(
            f"the model converted from {path.name} was changed: {changed}; delete "
            f"{target} and run again"
        )
    return target


def unpack_gguf(path: Path, folder: Path, progress: Progress = silent) -> None:
    """Write a GGUF file as a Hugging Face checkpoint in bfloat16.

    Raises:
        ModelError, CheckpointError: as in `convert_file`.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    header = read_gguf(path)
    if header.architecture == "deci":
        raise ModelError(
            f"{path.name} may have layers without attention, which transformers lacks; use "
            "llama.cpp, or the checkpoint"
        )
    header.check_blocks()
    numbers = sum(tensor.n_elements for tensor in header.tensors.values())
    loader: Any = AutoModelForCausalLM
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    with progress(f"unpacking {path.name}", 2) as bar:
        with (
            catch_errors(f"{path.name} with transformers"),
            # One of transformers' progress bars cannot be turned off.
            contextlib.redirect_stderr(io.StringIO()),
            limit_structure(numbers, path.name),
        ):
            tokenizer = AutoTokenizer.from_pretrained(**source)
            model, report = loader.from_pretrained(
                **source,
                **get_unpacking(),
                dtype=torch.bfloat16,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        refuse_incomplete(report, path)
        refuse_infinite(model.named_parameters(), path)
        bar.advance(1)
        # `save_pretrained` fails if a quantiser is attached.
        for trace in ("hf_quantizer", "quantization_method", "is_quantized"):
            model.__dict__.pop(trace, None)
        model.config.__dict__.pop("quantization_config", None)
        with quiet_transformers():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        bar.advance(1)
