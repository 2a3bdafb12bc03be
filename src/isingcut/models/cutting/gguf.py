"""GGUF in, smaller GGUF out: blocks renumbered, per-layer metadata trimmed, bytes untouched.

The checkpoint route (`excise`) unpacks a GGUF file to bfloat16; this one keeps every packed
tensor as it is, for llama.cpp, but those that a patch has changed (`gguf_patch`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from isingcut.errors import ArchitectureError, CheckpointError, OutputExistsError
from isingcut.files.writing import atomic_file, refuse_source
from isingcut.models.architectures.surgery import renumbering
from isingcut.models.checkpoint.gguf_header import GgufHeader, block_of, read_gguf
from isingcut.models.cutting.gguf_patch import Changed, laid_out, pack

# Architectures whose blocks llama.cpp configures from metadata alone. It derives the kind of a
# block from its number in the others (cohere2, llama4, smollm3, gpt-oss, ...), or from how many
# there are (baichuan), so that a renumbered block would compute something else there.
_CUTTABLE = {
    "arcee",
    "bloom",
    "command-r",
    "deepseek",
    "deepseek2",
    "falcon",
    "falcon-h1",
    "falcon_h1",
    "glm4",
    "gpt2",
    "gemma2",
    "gemma3",
    "gptneox",
    "granite",
    "granitehybrid",
    "granitemoe",
    "internlm2",
    "jamba",
    "lfm2",
    "llama",
    "mamba",
    "mamba2",
    "mistral3",
    "nemotron",
    "nemotron_h",
    "nemotron_h_moe",
    "olmo",
    "olmo2",
    "olmoe",
    "phi2",
    "phi3",
    "qwen2",
    "qwen2moe",
    "qwen3",
    "qwen3moe",
    "stablelm",
    "starcoder2",
}
# Every so many blocks one has full attention there, the others windows, unless a list says which.
_WINDOWS = "attention.sliding_window_pattern"
_WINDOW_PERIODS = {"gemma2": 2, "gemma3": 6}
# Numbers of blocks by which llama.cpp knows a model that it computes otherwise: DeepSeek-V2-Lite
# and GLM-4.7-Flash (other tensors, another router), Gemma 27B (another scale of attention).
_KNOWN_BY_DEPTH = {"deepseek2": {26, 27, 47, 48}, "gemma2": {46}, "gemma3": {62}}
# Keys below the architecture's name that hold one entry per block when they are arrays.
_SLICED = {
    "attention.head_count",
    "attention.head_count_kv",
    _WINDOWS,
    "expert_count",
    "expert_used_count",
    "feed_forward_length",
}
_PREFIX = {"leading_dense_block_count"}
_NOT_PER_LAYER = {"rope.dimension_sections", "rope.scaling.attn_factors"}


def cut_gguf(
    source: Path,
    removed: Sequence[int],
    out: Path,
    *,
    overwrite: bool = False,
    changed: Mapping[str, Changed] | None = None,
) -> None:
    """Write the GGUF file ``source`` without the blocks ``removed`` to the file ``out``.

    Args:
        source: a single GGUF file.
        removed: block numbers, in any order.
        out: the new file; it appears only when it is whole.
        overwrite: allow ``out`` to be replaced.
        changed: tensors that a patch has changed, by their names in ``source``.

    Raises:
        OutputExistsError: ``out`` exists and ``overwrite`` is false.
        ArchitectureError: llama.cpp would compute something else from the renumbered blocks.
        CheckpointError: no readable GGUF file, one part of a split file, a damaged one, or one
            that lacks tensors.
        InputError: ``out`` cannot be written or is the source.
    """
    refuse_source(out, [source])
    if os.path.lexists(out) and not overwrite:
        raise OutputExistsError(f"{out} already exists; nothing was written")
    header = read_gguf(source)
    count = header.number("block_count")
    _refuse(header)
    mapping = renumbering(count, removed)
    _refuse_depth(header.architecture, count, len(mapping))
    header.check_blocks()
    if changed and header.big_endian:
        raise ArchitectureError(
            f"{source} is big-endian, and a patch is only put into little-endian files; cut it "
            "without a patch (--patch none)"
        )
    import gguf

    reader = header.reader
    fields = {k: header.value(k) for k in reader.fields if not k.startswith("GGUF.")}
    architecture = header.architecture
    _refuse_unwritable(source, architecture, fields)
    windows = _windows(source, architecture, fields, count)
    if windows is not None:
        fields.pop(f"{architecture}.{_WINDOWS}", None)
    values = {k: _cut_value(architecture, k, v, count, mapping) for k, v in fields.items()}
    with atomic_file(out) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture, endianess=reader.endianess)
        if "general.alignment" in values:
            writer.data_alignment = int(values["general.alignment"])
        for key, value in values.items():
            if key == "general.architecture":
                continue
            kinds = reader.fields[key].types
            inner = kinds[-1] if kinds[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, value, kinds[0], sub_type=inner)
        if windows is not None:
            writer.add_sliding_window_pattern([windows[i] for i in mapping])
        kept = []
        for tensor in reader.tensors:
            name = _new_name(tensor.name, mapping)
            if name is None:
                continue
            data, kind = tensor.data, tensor.tensor_type
            if changed and tensor.name in changed:
                data, kind = pack(laid_out(source, tensor, changed[tensor.name]), kind)
            kept.append(data)
            writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for data in kept:  # memory-mapped: one tensor at a time
            writer.write_tensor_data(data, tensor_endianess=reader.endianess)
        writer.close()


def _refuse(header: GgufHeader) -> None:
    architecture = header.architecture
    if architecture not in _CUTTABLE:
        raise ArchitectureError(
            f"llama.cpp may derive what a block of {architecture!r} is from its number, which a "
            "cut changes, in a GGUF as in a converted checkpoint; run the cut checkpoint in "
            "transformers or vLLM"
        )
    if header.value(f"{architecture}.nextn_predict_layers"):
        raise ArchitectureError(
            f"{header.path} counts extra prediction heads among its blocks; cut the Hugging Face "
            "checkpoint and convert it instead"
        )
    parts = header.value("split.count")
    if isinstance(parts, int) and parts > 1:
        raise CheckpointError(f"{header.path} is one part of a split file; merge the parts first")


def _refuse_depth(architecture: str, before: int, after: int) -> None:
    known = _KNOWN_BY_DEPTH.get(architecture, set()) & {before, after}
    if known:
        raise ArchitectureError(
            f"llama.cpp computes a {architecture!r} of {min(known)} blocks otherwise than one of "
            f"another depth, and this cut goes from {before} to {after}; run the cut checkpoint in "
            "transformers or vLLM"
        )


def _windows(
    source: Path, architecture: str, fields: dict[str, Any], count: int
) -> list[bool] | None:
    """Which blocks have a sliding window, where llama.cpp counts that and no list says it."""
    period = _WINDOW_PERIODS.get(architecture)
    if period is None:
        return None
    if architecture == "gemma3" and not fields.get("gemma3.attention.sliding_window"):
        return None  # llama.cpp then gives no block a window; gemma2's have one by default
    stored = fields.get(f"{architecture}.{_WINDOWS}", period)
    if isinstance(stored, list) and len(stored) == count:
        return None
    if not isinstance(stored, int) or stored < 0:
        raise CheckpointError(
            f"{source}: expected a period or one entry for each of {count} blocks as its metadata "
            f"'{architecture}.{_WINDOWS}', got {stored!r:.60}"
        )
    return [stored == 0 or i % stored < stored - 1 for i in range(count)]


def _refuse_unwritable(source: Path, architecture: str, fields: dict[str, Any]) -> None:
    for key, value in fields.items():
        if value == []:
            raise CheckpointError(
                f"{source} has an empty list as its metadata {key!r}, and the package gguf writes "
                "none; take the key out first"
            )
        prefix = key.removeprefix(f"{architecture}.") in _PREFIX
        if prefix and not isinstance(value, int):
            raise CheckpointError(
                f"{source}: expected a whole number as its metadata {key!r}, got {value!r:.60}"
            )


def _cut_value(architecture: str, key: str, value: Any, count: int, mapping: dict[int, int]) -> Any:
    short = key.removeprefix(f"{architecture}.")
    if short == key:
        return value
    if short == "block_count":
        return len(mapping)
    if short in _PREFIX:
        return value - sum(i < value and i not in mapping for i in range(count))
    if isinstance(value, list) and len(value) == count and short not in _NOT_PER_LAYER:
        if short not in _SLICED:
            raise ArchitectureError(
                f"the metadata {key!r} looks per-layer and isingcut does not know what it means"
            )
        return [value[i] for i in mapping]
    return value


def _new_name(name: str, mapping: dict[int, int]) -> str | None:
    place = block_of(name)
    if place is None:
        return name
    old, rest = place
    return f"blk.{mapping[old]}.{rest}" if old in mapping else None
