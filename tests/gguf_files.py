"""GGUF files of tiny models."""

import gguf

from isingcut.formats.cutting import gguf as cutting
from tiny import by_blocks, tiny_model

cut_gguf = by_blocks(cutting.cut_gguf)

NAMES = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 8)


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


def held_by(model):
    """Return the tensors of a llama as a GGUF file holds them."""
    return named({n: t.numpy() for n, t in model.state_dict().items()})


def write_packed(path, kind):
    """Write a tiny llama with the layers of its blocks in a type; return the path."""
    held = held_by(tiny_model("llama", **WIDE))
    for name, values in held.items():
        if name.startswith("blk.") and values.ndim == 2:
            held[name] = (gguf.quantize(values, kind), kind)
    write(path, held, **WIDE_NUMBERS)
    return path
