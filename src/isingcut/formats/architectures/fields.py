"""Tables of per-layer configuration fields and of special model types; also the place of the
decoder's fields in a ``config.json``, as transformers reads it.

`cuts` applies the tables. A field of another form, and an unlisted field that looks per-layer, are
errors that name the field, never guesses. `families` handles what does not fit a table.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from isingcut.errors import ArchitectureError
from isingcut.formats.libraries import convert_errors, quiet_transformers

Entry = TypeVar("Entry")

# The first of these that is present is the number of blocks. Only fields with this number change.
# Decoders of encoder-decoders, used alone (BART), have the encoder's depth as num_hidden_layers.
COUNT = (
    "decoder_layers",
    "num_decoder_layers",
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "num_blocks",
    "layers",
)

# Lists (or strings) with one entry per block: sliced. Further entries, of layers for multi-token
# prediction, stay if these layers stay.
SLICE = (
    "activation_sparsity_pattern",
    "attention_layers",
    "attn_type_list",
    "compress_ratios",
    "full_attention_layers_mask",
    "hybrid_layer_pattern",
    "hybrid_override_pattern",
    "index_topk_pattern",
    "indexer_types",
    "intermediate_sizes",
    "is_moe_layer",
    "layer_rope_theta",
    "layer_types",
    "layers_block_type",
    "layers_num_experts",
    "mixer_types",
    "mlp_layer_types",
    "moe_layer_freq",
    "moe_layers_pattern",
    "no_rope_layers",
    "num_attention_heads_per_layer",
    "partial_rotary_factors",
    "qk_norm_layers",
    "sliding_window_layers",
    "sparse_attention_freq",
    "swiglu_limits",
    "swiglu_limits_shared",
    "window_sizes",
)

# Scalars that are lists with one entry per block in some checkpoints: sliced if they are lists.
SLICE_OR_SCALAR = (
    "intermediate_size",
    "moe_intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "moe_topk",
    "moe_num_experts",
    "num_experts",
    "num_experts_per_tok",
    "num_shared_expert",
    "head_dim",
    "rope_theta",
    "sliding_window",
)

# Lists of block numbers (or text: "3,4,5"): removed ones dropped, the others renumbered.
INDICES = (
    "attn_layer_indices",
    "attn_layers",
    "cross_attention_layers",
    "dense_layers",
    "fla_hybrid_attention_indices",
    "full_attn_idxs",
    "full_attention_layers",
    "full_attention_layer_ids",
    "global_attention_layers",
    "hybrid_layer_ids",
    "local_layer_ids",
    "mlp_only_layers",
    "moe_layers",
    "moe_layers_enum",
    "nope_layers",
    "rope_scaling_layers",
    "sliding_attention_layers",
    "slstm_at",
)

# The same, with the first block numbered 1.
INDICES_FROM_1 = ("full_attn_layers", "kda_layers", "ple_layer_ids")

# Of these, lists in which a block computes with its position (the hashes of Qwen4's n-grams):
# a block can be removed only together with all later ones in the list.
RANKED = ("ple_layer_ids",)

# One entry per block: the number of the block that it reads, itself or an earlier one.
SOURCES = ("kv_source_layers",)

# Maps keyed by block number: as INDICES.
MAPS = ("per_layer_config", "block_configs_by_layer", "layer_overrides")

# Number of first blocks that differ from the rest: lowered by the removed ones among them.
PREFIX = (
    "core_end",
    "core_start",
    "dense_mlp_idx",
    "first_k_dense_replace",
    "loop_layer_index_end",
    "loop_layer_index_start",
    "max_window_layers",
    "moe_layer_num_skipped",
    "moe_layer_start_index",
    "num_dense_layers",
    "num_hash_layers",
)

# Index of the last block that differs: lowered by the number of removed blocks up to it.
LAST = ("moe_layer_end_index",)

# Number of last blocks that differ from the rest: lowered by the removed ones among them.
SUFFIX = ("num_kv_shared_layers",)

# Numbers that a model multiplies by a power of the number of blocks: rescaled, so that the product
# stays the same. Value: the power.
DEPTH_POWERS = {"scale_depth": -0.5}

# A short list repeated to the depth of the model: written out in full, then sliced.
CYCLE = ("block_types",)

# Periods whose only use is to build a list that is written out in full: dropped.
# Value: the field that replaces them. If that field is absent, a period above 1 is an error.
GENERATORS = {
    "full_attention_interval": "layer_types",
    "global_attn_every_n_layers": "layer_types",
    "index_skip_topk_offset": "indexer_types",
    "index_topk_freq": "indexer_types",
    "interleave_moe_layer_step": "moe_layers",
    "layer_group_size": "layer_types",
    "moe_layer_interval": "mlp_layer_types",
    "no_rope_layer_interval": "no_rope_layers",
    "_sliding_window_pattern": "layer_types",
    "sliding_window_pattern": "layer_types",
}

# Number of layers for multi-token prediction, which read the last block's output and draft further
# tokens. They stay by default, and their own lists are not changed.
MTP = (
    "num_nextn_predict_layers",
    "num_mtp_layers",
    "mtp_num_hidden_layers",
    "mtp_num_layers",
)

# Fields for image features that join the stream between text blocks; `families` applies these two.
# Layers of the vision tower: the first one's features join after text block 0, then after 1, ...
DEEPSTACK = ("deepstack_visual_indexes",)
# Numbers of the text blocks in front of which features join, or tuples that end in such a number.
IMAGE_ENTRIES = ("deepstack_layer_map", "spatial_target_layers")

# Periods at which a kind of block repeats.
PERIODS = ("attn_layer_period", "expert_layer_period")

# Fields that only `families` reads; defaults are written out like those of the tables.
OF_FAMILIES = (
    "attention_types",
    "attn_layer_offset",
    "decoder_sparse_step",
    "expert_layer_offset",
    *PERIODS,
)

# Fields that a configuration class may derive, and that a cut must change.
WRITTEN_OUT = (
    *COUNT,
    *SLICE,
    *INDICES,
    *INDICES_FROM_1,
    *SOURCES,
    *PREFIX,
    *LAST,
    *SUFFIX,
    *DEPTH_POWERS,
    *CYCLE,
    *MTP,
    *OF_FAMILIES,
)

# Fields that look per-layer but are not.
NOT_PER_LAYER = {
    "altup_active_idx",
    "architectures",
    "attribute_map",
    "auto_map",
    "bad_words_ids",
    "begin_suppress_tokens",
    "block_ffn_dim_multiplier",
    "block_multiple_of",
    "block_size",
    "encoder_layers",
    "hidden_size_per_layer_input",
    "id2label",
    "index_block_size",
    "index_local_blocks",
    "index_topk_blocks",
    "insert_layer_id",  # of the vision tower
    "keys_to_ignore_at_inference",
    "label2id",
    "long_factor",
    "mamba_dt_limit",
    "mlp_multipliers",
    "mrope_section",
    "mtp_layer_types",
    "mtp_layers_block_type",
    "mtp_local_layer_ids",
    "mtp_mlp_layer_types",
    "num_encoder_layers",
    "num_mem_blocks",  # Zamba: `families` keeps the blocks that use them
    "num_random_blocks",
    "partial_rotary_factor",
    "problem_type",
    "pruned_heads",
    "rope_parameters",
    "rope_scaling",
    "short_factor",
    "ssm_multipliers",
    "suppress_tokens",
    "time_step_limit",
    "vocab_size_per_layer_input",
}

# Model types whose number of blocks is not the first of `COUNT` they have: the field that has it,
# and the factor of the other fields (a LongCat block has two attentions with a cache each).
COUNTED_BY = {"longcat_flash": ("num_layers", 2)}

# Model types in which these fields have one entry per modality, not per block.
PER_MODALITY = {
    "ernie4_5_vl_moe": ("moe_intermediate_size", "moe_num_experts"),
}

# Model types that cannot be cut exactly, with the reason.
UNCUTTABLE = {
    "beam": "in which proportion a block adds to its input depends on the block number",
    "blt": "its blocks stand in three stacks that hand patches of bytes to one another",
    "diffllama": "its differential attention starts from a weight that depends on the block number",
    "diffusion_gemma": "each block of its decoder is shared with an encoder, which has as many",
    "dory": "some of its blocks run several times in one pass",
    "evolla": "which blocks have an adapter depends on the number of all blocks",
    "hrm_text": "its two stacks of blocks run several times in one pass",
    "idefics": "a cross-attention block of its own stands before every n-th block",
    "inkling2": "every n-th block adds up the outputs of those before it",
    "inkling2_loop": "every n-th block adds up the outputs of those before it",
    "minimax": "its linear attention decays at a rate that depends on the block number",
    "reformer": "its blocks pass on two streams, so that none of them can be skipped",
    "xlm": "its attentions, its feed-forwards and its norms stand in lists of their own",
    "zaya": "the router of each block reads what the router of the block before it computed",
}

# Blocks that have to stay (-1: the last), with the reason.
_LAST_IS_FULL = "the last block has to be full attention in this family"
STAY = {
    "gemma4": (-1, _LAST_IS_FULL),
    "gemma4_unified": (-1, _LAST_IS_FULL),
    "gpt_neox_japanese": (
        -1,
        "only the last block of this family has a bias after its attention",
    ),
    "modernbert-decoder": (
        0,
        "the first block of this family is the one without a norm before its attention",
    ),
    "rwkv": (0, "the first block of RWKV normalises the embeddings for all others"),
}

# Model types that need at least two blocks, with the reason.
TWO_STAY = {
    "rwkv": "transformers divides by one less than the number of blocks of RWKV"
}


def of_type(table: Mapping[str, Entry], model_type: Any) -> Entry | None:
    """Return the entry of a model type or, for ``"x_text"`` without one, of ``"x"``; else None."""
    name = str(model_type)
    return table.get(name) or table.get(name.removesuffix("_text"))


def counted_by(model_type: Any) -> tuple[str, ...]:
    """Return the fields that may have the number of blocks; the first one present is used."""
    return (*(of_type(COUNTED_BY, model_type) or ())[:1], *COUNT)


# Weights outside the blocks with a slice of equal width for each block: end of the tensor's name,
# and axis of the slices.
_PER_LAYER_EMBEDDING = {
    "embed_tokens_per_layer.weight": 1,
    "per_layer_model_projection.weight": 0,
}
DEPTH_SHAPED = dict.fromkeys(("gemma3n_text", "gemma4_text"), _PER_LAYER_EMBEDDING)

# Names of the decoder's part, for model types that transformers does not support.
_NAMES = ("text_config", "llm_config", "language_config")


def text_part(config: dict[str, Any]) -> dict[str, Any]:
    """Return the dictionary in ``config``, or ``config`` itself, that has the decoder's fields.

    Some published multimodal configurations lack the part that their class has for text: its
    fields are at the root (Qwen2-VL) or in a part of another name. Adding the part would hide them,
    so the place is found by changing a number and checking whether transformers reads it.

    Args:
        config: a checkpoint's ``config.json``; a missing part is added, empty.
    """
    derived = config_object(config)
    if derived is None:
        parts = (config[name] for name in _NAMES if isinstance(config.get(name), dict))
        return next(parts, config)
    path = path_of(derived, derived.get_text_config(decoder=True))
    text: Any = config
    for key in path:
        text = text.get(key) if isinstance(text, dict) else None
    if isinstance(text, dict):
        return text
    for part in (config, *config.values()):
        if isinstance(part, dict) and _is_read(config, part):
            return part
    text = config
    for key in path:
        if not isinstance(text.get(key), dict):
            text[key] = {}
        text = text[key]
    return text  # type: ignore[no-any-return]


def count_of(config: Any) -> int | None:
    """Return the number of blocks of a decoder's configuration object."""
    return first_whole(config, counted_by(config.model_type))


def first_whole(config: Any, names: Iterable[str]) -> int | None:
    """Return the first of these fields of a configuration object that is a whole number."""
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)


def config_object(config: dict[str, Any]) -> Any | None:
    """Return transformers' configuration object, or None for an unsupported model type.

    Raises:
        ArchitectureError: the configuration is not valid for its model type.
    """
    from transformers import CONFIG_MAPPING

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return None
    plain = {k: v for k, v in config.items() if k != "quantization_config"}
    what = f"the configuration is not a valid {model_type} configuration"
    with quiet_transformers(), convert_errors(ArchitectureError, what):
        return CONFIG_MAPPING[model_type].from_dict(_decode_floats(plain))


def decoder_object(config: dict[str, Any]) -> Any | None:
    """Return the decoder's part of `config_object`; None for an unsupported model type."""
    whole = config_object(config)
    return whole and whole.get_text_config(decoder=True)


@contextlib.contextmanager
def catch_unknown_form(key: str, value: Any) -> Iterator[None]:
    """Convert errors of code that reads a field, within the context, to one that names the field.

    Raises:
        ArchitectureError: the field has another form than the code expects.
    """
    try:
        yield
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:
        raise ArchitectureError(
            f"the configuration field {key!r} has an unknown form; got {value!r:.60}"
        ) from error


def _is_read(config: dict[str, Any], part: dict[str, Any]) -> bool:
    """Whether transformers reads the decoder's vocabulary size from a part, or from the root."""
    size = part.get("vocab_size")
    if not isinstance(size, int):
        return False
    changed = {**part, "vocab_size": size + 1}
    whole = {key: changed if value is part else value for key, value in config.items()}
    text = decoder_object(changed if part is config else whole)
    return bool(getattr(text, "vocab_size", None) == size + 1)


def _decode_floats(value: Any) -> Any:
    """Copy a value and resolve the tags that transformers writes for infinite numbers."""
    if isinstance(value, dict):
        if set(value) == {"__float__"}:
            return float(value["__float__"])
        return {k: _decode_floats(v) for k, v in value.items()}
    return [_decode_floats(v) for v in value] if isinstance(value, list) else value


def path_of(config: Any, wanted: Any) -> tuple[str, ...]:
    """Return the keys that lead from a configuration object to one inside it."""
    for key, value in vars(config).items():
        if value is wanted:
            return (key,)
        if hasattr(value, "get_text_config") and (deeper := path_of(value, wanted)):
            return (key, *deeper)
    return ()
