"""Cut a GGUF file to a smaller one: blocks renumbered, per-layer metadata cut, bytes unchanged.

`excise` needs a checkpoint, to which a GGUF file is dequantised in bfloat16. This module keeps
packed tensors as they are, for llama.cpp, except those that a patch changed.

Norms are compared to check that a GGUF file and a checkpoint are of one model. They are stored
unpacked, while other weights may be packed, permuted, split or joined. By default, layers that a
patch or a healing changed are packed as Q8_0, because a change of 1 % is less than half a step of a
4-bit type, which would round it away (docs/experiments/frontier.md).

llama.cpp has layers without attention in its architecture `deci`. A removed MLP stays as zeros.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from isingcut.console.progress import Progress, silent
from isingcut.errors import ArchitectureError, CheckpointError, InputError
from isingcut.files.writing import atomic_file
from isingcut.formats.architectures.cuts import renumber_blocks
from isingcut.formats.architectures.removed import Removed
from isingcut.formats.checkpoints import Checkpoint
from isingcut.formats.fp8 import read_plain, read_tensor, tile_of
from isingcut.formats.gguf_files import (
    PLAIN_TYPES,
    GgufHeader,
    block_of,
    packed_type,
    read_gguf,
)
from isingcut.formats.safetensors_files import PLAIN, StoredTensor

_WIDTHS = ("hidden_size", "n_embd", "d_model")
# Tables that llama.cpp computes itself: a checkpoint may have them, a GGUF file need not.
_COMPUTED = re.compile(r"\.(attn_rot_embd|rope_freqs)\b")


def check_same_model(header: GgufHeader, model: Path) -> None:
    """Raise if a GGUF file was not made from a checkpoint, as far as this can be checked.

    Args:
        header: header of the GGUF file.
        model: folder of the checkpoint.

    Raises:
        InputError: the number of blocks, the width or the values of a norm differ.
        CheckpointError: the GGUF file or the checkpoint is damaged.
    """
    theirs = Checkpoint.read(model)
    count = header.check_blocks()
    width = header.number("embedding_length")
    widths = [v for k in _WIDTHS if isinstance(v := theirs.text.get(k), int)]
    for what, number, wanted in (
        ("blocks", count, theirs.depth),
        ("numbers in its stream", width, [*widths, width][0]),
    ):
        if number != wanted:
            raise InputError(
                f"{header.path} is of another model: it has {number} {what}, the run's model "
                f"{wanted}"
            )
    for name, stored in names_in_gguf(header, count, theirs.stored).items():
        tensor = header.tensors.get(name)
        norm = tensor is not None and name.endswith("norm.weight")
        if norm and not _is_equal(tensor, stored):
            raise InputError(
                f"{header.path} is of another model: its tensor {name} differs from the run's "
                "model; give the GGUF file of that model"
            )


def names_in_gguf(
    header: GgufHeader, count: int, stored: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Return the checkpoint's tensors that have a name in llama.cpp, by this name."""
    import gguf

    architectures = {name: a for a, name in gguf.MODEL_ARCH_NAMES.items()}
    if header.architecture not in architectures:
        return {}
    known = gguf.get_tensor_name_map(architectures[header.architecture], count)
    named = {}
    for name, tensor in stored.items():
        theirs = known.get_name(name, try_suffixes=(".weight", ".bias"))
        if theirs is not None and not _COMPUTED.search(theirs):
            named[str(theirs)] = tensor
    return named


def _is_equal(tensor: Any, stored: StoredTensor) -> bool:
    """Whether unpacked values are equal up to bfloat16 rounding, or after adding 1, as to norms."""
    if stored.dtype not in PLAIN or not np.issubdtype(tensor.data.dtype, np.floating):
        return True
    ours = tensor.data.flatten()
    theirs = read_tensor(stored).double().flatten().numpy()
    if ours.size != theirs.size:
        return False
    return any(np.allclose(ours, theirs + m, rtol=0.02, atol=1e-3) for m in (0, 1))


_Turn = Callable[[NDArray[np.float32]], NDArray[np.float32]]
_FINE = (*PLAIN_TYPES, "Q8_0")
"""Types that a changed tensor keeps; others become Q8_0."""
_SAME = 0.35
"""Largest relative difference of a tensor and its packing; for two bits per weight it is 0.3."""


@dataclass(frozen=True, eq=False)
class Changed:
    """A tensor whose values a patch or a healing has changed.

    Attributes:
        name: name in the original, for messages.
        before: function that reads the original's value, to find its layout in the GGUF file.
        after: function that reads the final checkpoint's value.
    """

    name: str
    before: Callable[[], NDArray[np.float32]]
    after: Callable[[], NDArray[np.float32]]


def changed_tensors(
    header: GgufHeader, original: Path, cut: Path, removed: Removed
) -> dict[str, Changed]:
    """Return the tensors of a cut checkpoint that differ from its original, by name in the GGUF.

    Args:
        header: header of the original's GGUF file.
        original: the checkpoint that was cut.
        cut: the cut checkpoint, patched or healed.
        removed: the state, as from `find_removed`; its zeros do not count.

    Raises:
        ArchitectureError: the file has no tensor for one of them.
    """
    old, new = map(Checkpoint.read, (original, cut))
    known = names_in_gguf(header, old.depth, old.stored)
    theirs = {tensor.name: name for name, tensor in known.items()}
    places = {
        f"{new.prefix}{place}.": f"{old.prefix}{i}."
        for i, place in renumber_blocks(
            old.depth, removed.layers, old.mtp_layers
        ).items()
    }
    changed = {}
    for name, stored in new.stored.items():
        start = next((start for start in places if name.startswith(start)), "")
        before = places.get(start, "") + name.removeprefix(start)
        was = old.stored.get(before)
        if before in removed.zeroed:
            continue
        if was and was.dtype == stored.dtype and was.data() == stored.data():
            continue
        if was is None or theirs.get(before) not in header.tensors:
            raise ArchitectureError(_cannot(header.path, before))
        changed[theirs[before]] = Changed(
            before, partial(_values, old, before), partial(_values, new, name)
        )
    return changed


def _values(checkpoint: Checkpoint, name: str) -> NDArray[np.float32]:
    value = read_plain(name, checkpoint.stored, tile_of(checkpoint.config))
    numbers: NDArray[np.float32] = value.float().numpy()
    return numbers


def lay_out(path: Path, tensor: Any, changed: Changed) -> NDArray[np.float32]:
    """Return the changed values in the layout of a GGUF file: unchanged, transposed, plus 1 (norms
    of Gemma), or with the halves of each head's rows interleaved (queries and keys of Llama).

    Args:
        path: the file, for messages.
        tensor: tensor of gguf's reader, with the values before the change.

    Raises:
        ArchitectureError: the file's values match none of these, or their type cannot be read.
    """
    import gguf

    try:
        there = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise ArchitectureError(_cannot(path, changed.name)) from error
    most = 0.02 if tensor.tensor_type.name in PLAIN_TYPES else _SAME
    values = changed.before()
    # The heads can have any size that divides the rows.
    rows = len(values)
    sizes = [size for size in range(rows // 2, 0, -1) if rows % (2 * size) == 0]
    turns: list[_Turn] = [
        lambda x: x,
        np.transpose,
        lambda x: x + 1,
        *(partial(_interleave, size=size) for size in sizes),
    ]
    for turn in turns:
        before = turn(values)
        if before.shape == there.shape and _difference(there, before) <= most:
            return np.ascontiguousarray(turn(changed.after()))
    raise ArchitectureError(_cannot(path, changed.name))


def _interleave(values: NDArray[Any], size: int) -> NDArray[Any]:
    halves = values.reshape(-1, 2, size, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def _difference(values: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    size = float(np.linalg.norm(wanted.astype(np.float64)))
    return float(np.linalg.norm(values.astype(np.float64) - wanted)) / (size or 1.0)


def _cannot(path: Path, name: str) -> str:
    return (
        f"{path} stores {name} differently from the checkpoint, so its new values cannot be "
        "written to it; convert the cut checkpoint instead, or cut without a patch (--patch none)"
    )


_TABLE: dict[str, Any] = yaml.safe_load(
    Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")
)
_WINDOWS = "attention.sliding_window_pattern"


def cut_gguf(
    source: Path,
    removed: Removed,
    out: Path,
    *,
    drop_mtp: bool = False,
    changed: Mapping[str, Changed] | None = None,
    packed: str | None = None,
    progress: Progress = silent,
) -> None:
    """Write the GGUF file ``source`` without the blocks ``removed`` to the file ``out``.

    Args:
        source: a single GGUF file.
        removed: the state; its tensors that become zeros are found by their names.
        out: the new file; it appears only when it is complete, and replaces an old one.
        drop_mtp: leave out the layers for multi-token prediction, which otherwise stay.
        changed: tensors with new values, by their names in ``source``; packed as Q8_0 unless
            their type is finer.
        packed: type of all tensors, changed ones too, by `packed_type`; None: as they are.
        progress: shows the tensors as they are written.

    Raises:
        ArchitectureError: llama.cpp would compute something else from the renumbered blocks, or
            has no such model without attention.
        CheckpointError: the source is not a GGUF file, is damaged, is one part of a split file, or
            lacks tensors.
        InputError: ``out`` cannot be written.
    """
    header = read_gguf(source)
    count = header.number("block_count")
    mtp = header.mtp_layers
    mapping = renumber_blocks(count - mtp, removed.layers, 0 if drop_mtp else mtp)
    refuse_uncuttable(header, count, len(mapping))
    header.check_blocks()
    reader = header.reader
    if (changed or packed) and reader.byte_order == "S":
        raise ArchitectureError(
            f"{source} is {reader.endianess.name.lower()}-endian and this machine is not, so its "
            "tensors cannot get new values; cut it without a patch (--patch none)"
        )
    import gguf

    fields = {k: header.value(k) for k in reader.fields if not k.startswith("GGUF.")}
    architecture = header.architecture
    windows = _find_windows(header, fields, count)
    if windows is not None:
        fields.pop(f"{architecture}.{_WINDOWS}", None)
    values = {k: _cut_value(header, k, v, count, mapping) for k, v in fields.items()}
    if drop_mtp and mtp:
        values[f"{architecture}.nextn_predict_layers"] = 0
    dropped = {"attn": {*removed.attention}, "ffn": {*removed.mlps}}
    # llama.cpp reads the size of the heads from the first layer, whose attention becomes zeros.
    bare = dropped["attn"] - {min(mapping)}
    heads = dict[str, Any]()
    half = 0
    written = architecture
    if removed.attention:
        written = "deci"
        heads = _pop_heads(header, values, [i in bare for i in mapping])
        if _TABLE["deci"]["rotates"][architecture] == "halves":
            half = heads["attention.key_length"] // 2
    with atomic_file(out) as temporary:
        writer = gguf.GGUFWriter(temporary, written, endianess=reader.endianess)
        if "general.alignment" in values:
            writer.data_alignment = int(values["general.alignment"])
        for key, value in values.items():
            if key == "general.architecture":
                continue
            kinds = reader.fields[key].types
            inner = kinds[-1] if kinds[0] == gguf.GGUFValueType.ARRAY else None
            name = re.sub(rf"^{architecture}\.", f"{written}.", key)
            writer.add_key_value(name, value, kinds[0], sub_type=inner)
        for key, value in heads.items():
            add = writer.add_array if isinstance(value, list) else writer.add_uint32
            add(f"{written}.{key}", value)
        if windows is not None:
            writer.add_sliding_window_pattern([windows[i] for i in mapping])
        kept = []
        for tensor in reader.tensors:
            # Outside the blocks, tensors keep their names.
            old, rest = block_of(tensor.name) or (-1, "")
            part = rest.partition("_")[0]
            if rest and (old not in mapping or (part == "attn" and old in bare)):
                continue
            name = f"blk.{mapping[old]}.{rest}" if rest else tensor.name
            new = (changed or {}).get(tensor.name)
            kind = tensor.tensor_type
            shape = tensor.data.shape
            dtype = tensor.data.dtype
            numbers = tensor.shape[::-1].tolist()
            if packed is not None:
                given = {"inside": 0 <= old < count - mtp, "new": new is not None}
                kind = packed_type(tensor.name, numbers, kind, packed, **given)
            elif new is not None and kind.name not in _FINE:
                kind = gguf.GGMLQuantizationType.Q8_0
            if kind != tensor.tensor_type:
                shape = gguf.quants.quant_shape_to_byte_shape(numbers, kind)
                dtype = np.dtype(np.uint8)
            zero = old in dropped.get(part, ()) and "norm" not in rest
            turned = half if rest.startswith(("attn_q.", "attn_k.")) else 0
            kept.append((tensor, new, kind, zero, turned))
            size = math.prod(shape) * dtype.itemsize
            writer.add_tensor_info(name, shape, dtype, size, kind)
        with (
            contextlib.closing(writer),
            progress(f"writing {out.name}", len(kept)) as bar,
        ):
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            # Memory-mapped: one tensor at a time.
            for tensor, new, kind, zero, turned in kept:
                # In every type, zero bytes are zeros.
                data = np.zeros_like(tensor.data) if zero else tensor.data
                if new is not None:
                    data = gguf.quants.quantize(lay_out(source, tensor, new), kind)
                elif kind != tensor.tensor_type:
                    plain = gguf.quants.dequantize(data, tensor.tensor_type)
                    data = gguf.quants.quantize(plain, kind)
                if turned:
                    data = _interleave(data, turned)
                writer.write_tensor_data(data, tensor_endianess=reader.endianess)
                bar.advance(1)


def omits_attention(architecture: str) -> bool:
    """Whether llama.cpp runs the layers of an architecture but the first without attention.

    Args:
        architecture: of a GGUF file, or the model type of a checkpoint.
    """
    return architecture == "mistral" or architecture in _TABLE["deci"]["rotates"]


def _pop_heads(
    header: GgufHeader, values: dict[str, Any], bare: Sequence[bool]
) -> dict[str, Any]:
    """Take what llama.cpp's `deci` wants to know of heads out of a file's metadata.

    Args:
        values: metadata of the cut file, by full name.
        bare: whether each layer has no attention.

    Returns:
        the numbers of heads in each layer and their sizes, by name below the architecture's.

    Raises:
        ArchitectureError: `deci` cannot compute the model.
    """
    name = header.architecture
    known = re.compile(_TABLE["deci"]["tensors"])
    unknown = [f"has no {t!r}" for t in header.tensors if not known.fullmatch(t)]
    if name not in _TABLE["deci"]["rotates"]:
        unknown = [f"does not compute a {name!r}"]
    if unknown:
        raise ArchitectureError(
            "in llama.cpp only the architecture 'deci' has layers without attention, and it "
            f"{unknown[0]}; run the cut checkpoint in transformers or vLLM"
        )
    size = header.number("embedding_length") // header.number("attention.head_count")
    heads = dict[str, Any]()
    for short in (
        "attention.key_length",
        "attention.value_length",
        "rope.dimension_count",
    ):
        heads[short] = values.pop(f"{name}.{short}", size)
    for short in ("attention.head_count", "attention.head_count_kv"):
        if values.pop(f"{name}.{short}", None):
            heads[short] = [0 if gone else header.number(short) for gone in bare]
    return heads


def refuse_uncuttable(header: GgufHeader, before: int, after: int) -> None:
    """Raise if llama.cpp would compute something else from a file with another number of blocks.

    Raises:
        ArchitectureError, CheckpointError: as in `cut_gguf`.
    """
    architecture = header.architecture
    if architecture not in _TABLE["cuttable"]:
        raise ArchitectureError(
            f"llama.cpp may derive the kind of a {architecture!r} block from its number, which a "
            "cut changes, also in a converted checkpoint; run the cut checkpoint in transformers "
            "or vLLM"
        )
    parts = header.value("split.count")
    if isinstance(parts, int) and parts > 1:
        raise CheckpointError(
            f"{header.path} is one part of a split file; merge the parts first"
        )
    known = {before, after}.intersection(_TABLE["known_by_depth"].get(architecture, ()))
    if known:
        raise ArchitectureError(
            f"llama.cpp computes a {architecture!r} of {min(known)} blocks differently from other "
            f"depths, and this cut goes from {before} to {after}; run the cut checkpoint in "
            "transformers or vLLM"
        )


def _find_windows(
    header: GgufHeader, fields: dict[str, Any], count: int
) -> list[bool] | None:
    """Return whether each block has a sliding window, if no list has that but llama.cpp derives it
    from a period; else None."""
    architecture = header.architecture
    period = _TABLE["window_periods"].get(architecture)
    if period is None:
        return None
    if architecture == "gemma3" and not fields.get("gemma3.attention.sliding_window"):
        return None  # llama.cpp gives no block a window; gemma2's have one by default
    stored = fields.get(f"{architecture}.{_WINDOWS}", period)
    if isinstance(stored, list) and len(stored) == count:
        return None
    if not isinstance(stored, int) or stored < 0:
        raise CheckpointError(
            f"{header.path}: expected a period or one entry for each of {count} blocks as its "
            f"metadata '{architecture}.{_WINDOWS}', got {stored!r:.60}"
        )
    return [stored == 0 or i % stored < stored - 1 for i in range(count)]


def _cut_value(
    header: GgufHeader, key: str, value: Any, count: int, mapping: dict[int, int]
) -> Any:
    if value == []:
        raise CheckpointError(
            f"{header.path} has an empty list as its metadata {key!r}, which the package gguf "
            "cannot write; remove the key first"
        )
    short = key.removeprefix(f"{header.architecture}.")
    if short == key:
        return value
    if short == "block_count":
        return len(mapping)
    if short in _TABLE["prefix"]:
        if not isinstance(value, int):
            raise CheckpointError(
                f"{header.path}: expected a whole number as its metadata {key!r}, got {value!r:.60}"
            )
        return value - sum(i < value and i not in mapping for i in range(count))
    listed = isinstance(value, list) and len(value) == count
    if not listed or short in _TABLE["not_per_layer"]:
        return value
    if short not in _TABLE["sliced"]:
        raise ArchitectureError(
            f"the metadata {key!r} looks per-layer, but isingcut does not know it"
        )
    return [value[i] for i in mapping]
