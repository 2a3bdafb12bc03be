"""Whether a GGUF file is of a given Hugging Face checkpoint: depth, width and norms.

The weights themselves may be packed, permuted, split or joined; norms are stored as they are, in
plain numbers, whatever the rest is packed as.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from isingcut.errors import InputError
from isingcut.models.architectures.surgery import depth, written_out
from isingcut.models.checkpoint.gguf_header import GgufHeader
from isingcut.models.checkpoint.read import PLAIN, StoredTensor, read_checkpoint, read_config
from isingcut.models.fp8 import read_tensor

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
