"""Whether a GGUF file is of a given Hugging Face checkpoint: depth, width, names, sizes, norms.

The weights themselves may be packed, permuted, split or joined; norms are stored as they are, in
plain numbers, whatever the rest is packed as.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from isingcut.errors import CheckpointError, InputError
from isingcut.models.architectures.surgery import depth, written_out
from isingcut.models.checkpoint.gguf_header import GgufHeader, GgufTensor, block_of
from isingcut.models.checkpoint.read import PLAIN, StoredTensor, read_checkpoint, read_config
from isingcut.models.fp8 import read_tensor

_WIDTHS = ("hidden_size", "n_embd", "d_model")
# What a checkpoint may hold and a GGUF need not: tables that llama.cpp computes itself.
_COMPUTED = re.compile(r"\.(attn_rot_embd|rope_freqs)\b")
_PLAIN = {0: "<f4", 1: "<f2"}


def check_same_model(header: GgufHeader, model: Path) -> None:
    """Refuse a GGUF file that was not made from a checkpoint, as far as it can be known.

    Args:
        header: of the GGUF file.
        model: the checkpoint's folder.

    Raises:
        InputError: another number of blocks, another width, or tensors of other sizes or values.
        CheckpointError: tensors that the checkpoint has are missing, or either is damaged.
    """
    blocks = header.blocks()
    text = written_out(read_config(model))
    _same(header, "blocks", len(blocks), depth(text))
    width = next((text[k] for k in _WIDTHS if isinstance(text.get(k), int)), None)
    if width is not None:
        _same(header, "numbers in its stream", header.number("embedding_length"), width)
    names = names_in_gguf(header, len(blocks), read_checkpoint(model))
    for i, block in enumerate(blocks):
        here = {f"blk.{i}.{name}" for name in block}
        wanted = {name for name in names if name.startswith(f"blk.{i}.")}
        # A file with names of its own has split or joined tensors; one without lacks some.
        if here < wanted:
            lacking = min(wanted - here)
            raise CheckpointError(
                f"{header.path} lacks the tensor {lacking}, which the model has as "
                f"{names[lacking].name}; the file is incomplete: get it again"
            )
    for name, stored in names.items():
        tensor = header.tensors.get(name)
        if tensor is None:
            continue
        if block_of(name) and math.prod(tensor.shape) != math.prod(stored.shape):
            raise InputError(
                f"{header.path} is of another model: its tensor {name} has the shape "
                f"{list(reversed(tensor.shape))}, the run's model has {list(stored.shape)}"
            )
    for name, stored in names.items():
        tensor = header.tensors.get(name)
        if (
            tensor is not None
            and name.endswith("norm.weight")
            and not _alike(header, tensor, stored)
        ):
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


def _alike(header: GgufHeader, tensor: GgufTensor, stored: StoredTensor) -> bool:
    """Whether plain numbers are equal to bfloat16's rounding; some conversions add one to norms."""
    ours = _values(header, tensor)
    theirs = _stored_values(stored)
    if ours is None or theirs is None or ours.size != theirs.size:
        return True
    return any(np.allclose(ours, theirs + more, rtol=0.02, atol=1e-3) for more in (0.0, 1.0))


def _values(header: GgufHeader, tensor: GgufTensor) -> Any:
    if tensor.kind not in _PLAIN or header.big_endian:
        return None
    with header.path.open("rb") as f:
        f.seek(tensor.start)
        return np.frombuffer(f.read(tensor.size), _PLAIN[tensor.kind]).astype(np.float64)


def _stored_values(stored: StoredTensor) -> Any:
    return read_tensor(stored).double().flatten().numpy() if stored.dtype in PLAIN else None
