"""GGUF files of tiny models, valid and hostile."""

import struct
from functools import cache

import gguf
import numpy as np
from safetensors.numpy import load_file

from tiny import tiny_model

NAMES = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 8)
TEXT = 8
LIST = 9
WORD = 4


def named(held):
    """Return tensors under their llama.cpp names."""
    return {
        NAMES.get_name(n, try_suffixes=(".weight", ".bias")): t for n, t in held.items()
    }


def write_gguf(
    path, metadata, held, *, architecture="llama", more=lambda writer: None, **writing
):
    """Write a GGUF file of these tensors, and of the architecture's own metadata.

    Args:
        metadata: values by key; None omits a key.
        held: tensors by name, each an array or a pair (data, type).
        more: function that writes further entries.
        writing: options of the writer.
    """
    writer = gguf.GGUFWriter(path, architecture, **writing)
    add = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in metadata.items():
        if value is not None:
            add[type(value)](f"{architecture}.{key}", value)
    more(writer)
    for name, tensor in held.items():
        data, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


NUMBERS = {
    "context_length": 128,
    "embedding_length": 32,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
}
# A tiny llama whose rows can be packed, and its metadata.
WIDE = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
WIDE_NUMBERS = {
    "embedding_length": 64,
    "feed_forward_length": 64,
    "rope.dimension_count": 16,
}


def write(path, held, *, architecture="llama", blocks=6, **changes):
    """Write a file of float32 tensors with metadata of a tiny llama."""
    size = {"feed_forward_length": 48, "rope.dimension_count": 8, "vocab_size": 262}
    metadata = {"block_count": blocks, **NUMBERS, **size, **changes}

    def more(writer):
        writer.add_name("tiny")
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_freq_base(10000.0)
        tokens = [
            "<unk>",
            "<s>",
            "</s>",
            *(f"<0x{i:02X}>" for i in range(256)),
            "a",
            "b",
            "c",
        ]
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores([0.0] * len(tokens))
        writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * 3)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)

    write_gguf(path, metadata, held, architecture=architecture, more=more)


def write_packed(path, kind):
    """Write a tiny llama with the layers of its blocks in a type; return the path."""
    held = named(
        {n: t.numpy() for n, t in tiny_model("llama", **WIDE).state_dict().items()}
    )
    for name, values in held.items():
        if name.startswith("blk.") and values.ndim == 2:
            held[name] = (gguf.quantize(values, kind), kind)
    write(path, held, **WIDE_NUMBERS)
    return path


def file(edit=lambda held: None, **metadata):
    """Return a step that writes the arena's model as ``m.gguf``, after ``edit`` of its tensors."""

    def prepare(arena):
        held = named(load_file(arena.model / "model.safetensors"))
        edit(held)
        write(arena.here / "m.gguf", held, **metadata)

    return prepare


def of_model(seed=0, **changes):
    """Return a step that writes another tiny llama as ``m.gguf``."""

    @cache
    def made():
        model = tiny_model("llama", seed=seed, **changes)
        return named({n: t.numpy() for n, t in model.state_dict().items()})

    def prepare(arena):
        write(arena.here / "m.gguf", made(), blocks=changes.get("num_hidden_layers", 6))

    return prepare


def lacking(*parts):
    """Return `file` without the tensors whose names contain one of ``parts``."""

    def edit(held):
        for name in [n for n in held if any(p in n for p in parts)]:
            del held[name]

    return file(edit)


def changed(edit):
    """Return a step that writes the whole file with its bytes changed by ``edit``."""

    def prepare(arena):
        file()(arena)
        path = arena.here / "m.gguf"
        data = bytearray(path.read_bytes())
        path.write_bytes(edit(data) or data)

    return prepare


def at(place, code, value):
    """Return `changed` with another number at a byte offset."""
    return changed(lambda data: struct.pack_into(f"<{code}", data, place, value))


def text(words):
    """Return a string in the encoding of GGUF."""
    data = words if isinstance(words, bytes) else words.encode()
    return struct.pack("<Q", len(data)) + data


def pair(key, kind, value):
    """Return one entry of the metadata."""
    return text(key) + struct.pack("<I", kind) + value


def info(name="a", shape=(32,), kind=0, offset=0):
    """Return one entry of the tensor list."""
    return text(name) + struct.pack(
        f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset
    )


def raw(pairs=(), infos=(), *, version=3, tail=4096):
    """Return a step that writes a file from metadata entries and tensor entries."""

    def prepare(arena):
        head = b"GGUF" + struct.pack("<IQQ", version, len(infos), len(pairs))
        data = head + b"".join(pairs) + b"".join(infos)
        data += bytes(-len(data) % 32 + tail)
        (arena.here / "m.gguf").write_bytes(data)

    return prepare


def nan(name):
    """Return `file` with one NaN in a tensor."""

    def edit(held):
        held[name] = held[name].copy()
        held[name].flat[5] = np.nan

    return file(edit)
