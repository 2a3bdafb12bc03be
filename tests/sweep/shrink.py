"""Tiny configurations of any class of transformers, derived by rule from its own defaults.

A field is shrunk according to its name and its default. All widths become one width, all head
counts one count, and so on. Fields that must agree then agree without a rule that relates them:
a vision tower is as wide as its decoder. Fields that a class derives from others (``layer_types``
from the depth, ``head_dim`` from the width) are derived again. `HANDS` has the configurations for
which these rules are not enough.
"""

import copy
import dataclasses
import re
from typing import Any, cast

from transformers import CONFIG_MAPPING, PreTrainedConfig

WIDTH = 64
HEADS = 4
HEAD_DIM = 16
INNER = 96
# Special ids, such as of an image, come first; random tokens are drawn from the others.
VOCABULARY = 256 + 6
DEPTH = 6
TOWER_DEPTH = 4

_DEPTH = re.compile(
    r"num_hidden_layers|n_layers?|num_layers|(encoder|decoder)_layers|depth|layers"
    r"|num_(encoder|decoder|lstm)_layers|num_blocks|resampler_depth"
    r"|(conf|decoder|resampler)_num_(hidden_)?layers"
)
# The patterns of a size match whole names; the first match decides. Only integers are shrunk:
# switches and fractions stay.
_SIZES = (
    # Ids of tokens.
    (0, "pad_token_id"),
    (1, "(decoder_start|bos)_token_id"),
    (2, "(forced_)?eos_token_id sep_token_id"),
    (3, "(image|img|media_placeholder)_token(_id|_index)?"),
    (4, "video_token(_id|_index)?"),
    (5, "audio_token(_id|_index)?"),
    (6, r"(vision|image|im)_(start|bos)_token_id boi_token_(id|index)"),
    (
        7,
        r"\w*(token|start|end|newline|bos|eos|pad)_(id|index) (unk|mask)_index \w*_token",
    ),
    # Vocabularies, positions and windows.
    (2, "(type|task_type|additional)_vocab_size"),
    (
        64,
        r"(codebook|audio_vocab|mel_vocab|num_embeddings|num_embeds)\w* num_position_embeddings",
    ),
    (VOCABULARY, r"\w*vocab_size\w* encoder_hash_byte_group_vocab"),
    (
        256,
        "max_position_embeddings n_positions n_ctx max_seq_len max_(source|target)_positions",
    ),
    (128, "original_max_position_embeddings context_length model_max_length"),
    (8, "sliding_window(_size)? (attention_)?window_size attention_chunk_size"),
    # Attention.
    (HEADS // 2, r"\w*kv_heads \w*key_value_heads num_query_groups kv_n_heads"),
    (8, "linear_num(_value)?_heads mamba_n(um)?_heads n_mamba_heads"),
    (HEADS, r"\w*_heads n_heads? num_centroids"),
    (8, "qk_rope_head_dim rotary_dim"),
    (HEAD_DIM + 8, "qk_head_dim"),
    (
        HEAD_DIM,
        r"\w*head_dim\w* \w*d_head kv_channels d_kv dim_head attention_head_size",
    ),
    (HEAD_DIM, "mamba_headdim"),
    (16, r"\w+_rank"),
    # Experts.
    (2, "num_experts_per_tok(en)? moe_top_?k moe_k top_k_experts"),
    (4, r"\w*num_(local_)?experts n_routed_experts zero_expert_num"),
    (1, r"\w*n(um)?_shared_experts? topk_group"),
    (2, "n_group num_expert_group"),
    (2, "first_k_dense_replace num_dense_layers moe_layer_start_index"),
    (4, "moe_layer_end_index"),
    (3, "max_window_layers"),
    (2, "num_kv_shared_layers"),
    (4, "index_kpool"),
    (8, "index_topk indexer_budget"),
    # Recurrent states.
    (16, r"\w*state_size \w*d_state"),
    (1, "(mamba_)?n_?groups"),
    (8, "(mamba_)?chunk_size"),
    (2 * WIDTH, "mamba_d_ssm lru_width"),
    # Convolutional towers.
    (32, "base_channels"),
    (1, "num_res_blocks"),
    (2, "channel_multiplier depths"),
    # Widths.
    (
        INNER,
        r"\w*(intermediate|ffn_dim|ffn_hidden|feed_forward)\w* d_ff dff dim_ff n_inner",
    ),
    (INNER, "mlp_dim d_inner share_expert_dim"),
    (
        WIDTH,
        r"\w*hidden_(size|dim)\w* d_model n_embd \w*embed_dim embedding_(size|dim)",
    ),
    (WIDTH, r"dim width emb_dim"),
    (WIDTH, r"\w*channels?"),
    (
        WIDTH,
        r"(vision_)?(out|output|projector|projection|adapter)_\w*(dim|size|channels)",
    ),
)
_NAMED = [(re.compile("|".join(names.split())), size) for size, names in _SIZES]
_BLOCK_LISTS = re.compile(r".*(index|idx|_layers?|_ids|layer_ids|block).*")
# Fields that are None by default, although no model can be built without them.
_NEEDED = re.compile(
    r"(attention_)?head_dim|num_key_value_heads|num_experts|n_routed_experts|n_shared_experts"
    r"|num_experts_per_tok|top_k_experts"
)
# If a class has equal defaults for both, the first field gets the value of the second.
_ALIKE = (
    ("num_key_value_heads", "num_attention_heads"),
    ("head_dim", "qk_rope_head_dim"),
)
_TOWER = re.compile(r"vision|audio|image|speech|protein|encoder|vq|perceiver|qformer")


def tiny_configuration(model_type):
    """Return the configuration of a tiny model of any model type of transformers.

    Raises:
        Exception: any error of its class, if it rejects the derived arguments.
    """
    cls = CONFIG_MAPPING[model_type]
    return cls(**_tiny_values(_default(cls), DEPTH))


def _default(cls):
    try:
        return cls()
    except Exception:
        if cls.model_type not in HANDS:
            raise
    return cls(**copy.deepcopy(HANDS[cls.model_type]))


def _tiny_values(default, depth):
    """Return arguments that make the class of a default configuration describe a tiny model."""
    cls = type(default)
    plain = _default(cls)
    old = _depth_of(default)
    declared = _declared(cls)
    values = {}
    for name, actual in vars(default).items():
        if hasattr(actual, "to_dict") and hasattr(actual, "model_type"):
            inner = TOWER_DEPTH if _TOWER.search(name) else depth
            values[name] = {
                "model_type": actual.model_type,
                **_tiny_values(actual, inner),
            }
    for name, value in declared.items():
        if name in values:
            continue
        # Not by attribute, which raises an error if a field differs by layer.
        actual = vars(default).get(name)
        # A value set by the surrounding configuration replaces the class's own default.
        found = value if actual == vars(plain).get(name) else actual
        if found is None and actual is None and _NEEDED.fullmatch(name):
            found = _named(name)
        small = _KEEP if found is None else _small(name, found, old, depth)
        if small is not _KEEP or found is not value:
            values[name] = found if small is _KEEP else small
    for one, other in _ALIKE:
        if declared.get(one) is not None and declared[one] == declared.get(other):
            values[one] = values[other]
    sections = "mrope_section" in getattr(cls, "ignore_keys_at_rope_validation", ())
    for name in ("rope_parameters", "rope_scaling"):
        rope = vars(default).get(name)
        if name in declared and rope and (sections or "mrope_section" in rope):
            values[name] = {**rope, "mrope_section": _sections(rope, values)}
    _join(values, copy.deepcopy(HANDS.get(cls.model_type, {})))
    return _all_kinds(default, values, old, depth)


_KEEP = object()


def _declared(cls):
    """Return the declared defaults of a class by field, before any is derived from others."""
    common = {f.name for f in dataclasses.fields(cast(Any, PreTrainedConfig))}
    found = {}
    for field in dataclasses.fields(cls):
        if field.name in common:
            continue
        if field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
    return found


def _depth_of(config):
    names = [name for name in vars(config) if _DEPTH.fullmatch(name)]
    found = [vars(config).get(name) for name in ("num_hidden_layers", *names)]
    return next((n for n in found if isinstance(n, int) and n > 0), 0)


def _small(name, value, old, depth):
    """Return the size of a field in a tiny model, or `_KEEP` if it may stay as it is."""
    if isinstance(value, (bool, str, float)):
        return _KEEP
    size = depth if _DEPTH.fullmatch(name) else _named(name)
    if isinstance(value, int):
        return _KEEP if size is None or value < 0 else min(value, size)
    if not isinstance(value, (list, tuple)) or not value:
        return _KEEP
    numbers = all(isinstance(v, int) and not isinstance(v, bool) for v in value)
    if (
        numbers
        and _BLOCK_LISTS.fullmatch(name)
        and _differ(value)
        and depth <= max(value) <= old
    ):
        return sorted({v * depth // (old + 1) for v in value})
    if len(value) == old > depth:
        return spread(list(value), depth)
    return [min(v, size) for v in value] if numbers and size is not None else _KEEP


def _named(name):
    return next((size for pattern, size in _NAMED if pattern.fullmatch(name)), None)


def _sections(rope, values):
    """Return shares of time, height and width that fill half of the tiny rotary dimensions."""
    width = values.get("qk_rope_head_dim") or HEAD_DIM
    wanted = int(width * rope.get("partial_rotary_factor", 1.0)) // 2
    old = rope.get("mrope_section", (1, 1, 1))
    found = [wanted * part // sum(old) for part in old]
    for i in range(wanted - sum(found)):
        found[i] += 1
    return found


def _join(values, hand):
    for name, value in hand.items():
        if isinstance(value, dict) and isinstance(values.get(name), dict):
            _join(values[name], value)
        else:
            values[name] = value


def _all_kinds(default, values, old, depth):
    """Return the arguments, with per-layer lists if a short model would lack a kind of block."""
    lists = {
        name: value
        for name, value in vars(default).items()
        if isinstance(value, list) and len(value) == old > depth
        if name not in values and not _differ(value)
    }
    try:
        tiny = type(default)(**values)
    except Exception:
        lost = list(lists)
    else:
        lost = [
            n
            for n, v in lists.items()
            if {*map(repr, v)} - {*map(repr, getattr(tiny, n, ()))}
        ]
    return {**values, **{name: spread(lists[name], depth) for name in lost}}


def _differ(values):
    return len({*map(repr, values)}) == len(values)


def spread(values, count):
    """Return ``count`` entries of a longer list, in order, as many different ones as possible."""
    kept = [round(i * (len(values) - 1) / (count - 1)) for i in range(count)]
    first = {}
    for i, entry in enumerate(values):
        first.setdefault(repr(entry), i)
    for name, i in list(first.items())[:count]:
        there = [repr(values[k]) for k in kept]
        if name not in there and not _differ(there):
            # Replace one of two equal entries.
            place = next(p for p, seen in enumerate(there) if there.count(seen) > 1)
            kept[place] = i
    return [values[k] for k in sorted(kept)]


_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
# Two merged patches per side.
_WINDOWS = {"window_size": 56}
_VISUAL_TOKENS = {f"<|visual token {i:06d}|>": 8 + i for i in range(64)}

# Model type of a configuration, whole or part -> arguments added to the derived ones or replacing
# them; dictionaries are merged recursively.
HANDS = {
    # The default has no attention block, and transformers cannot generate with such a model.
    "bamba": {"attn_layer_indices": [1, 4]},
    "granitemoehybrid": {"layer_types": ["mamba", "mamba", "attention"] * 2},
    # The default does not set fields that the model needs.
    "apertus1p5": {"image_token_offset": 8, "audio_token_offset": 72},
    "blip-2": {"image_token_index": 3},
    "instructblip": {"image_token_index": 3},
    "instructblipvideo": {"video_token_index": 3},
    "chameleon": {
        # Few codes, with ids that random tokens do not have: their logits are masked.
        "vq_config": {"num_embeddings": 4},
        "vocabulary_map": {
            "<image>": 3,
            **{f"IMGIMG{c}Z": 4 + i for i, c in enumerate("ABCD")},
        },
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            "sliding_attention": _ROPE,
            "full_attention": {**_ROPE, "mrope_section": [3, 3, 2]},
        },
    },
    # Its cache has as many layers as the encoder, so that the default (2, 24) cannot generate.
    "blenderbot": {"encoder_layers": 6},
    "dbrx": {"attn_config": {"rope_theta": 10_000.0, "clip_qkv": 8.0}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", *["sparse"] * 5]},
    "diffusion_gemma_text": {"moe_intermediate_size": 32},
    "emu3": {"vocabulary_map": {"<image>": 3, "<|extra_200|>": 7, **_VISUAL_TOKENS}},
    "granite4_vision": {
        "vision_config": {
            **_VISION,
            "model_type": "clip_vision_model",
            "image_size": 56,
        },
        "image_grid_pinpoints": [[56, 56], [56, 112]],
        "downsample_rate": "1/2",
        "deepstack_layer_map": [(0, 1), (1, 3)],
        "spatial_target_layers": [2, 4],
    },
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"] * 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "hunyuan_vl_text": {"rope_parameters": {**_ROPE, "mrope_section": [2, 2, 2, 2]}},
    "paddleocr_vl_text": {"rope_parameters": {**_ROPE, "mrope_section": [2, 3, 3]}},
    # Sizes of images and of the modules that read them must agree.
    "aria": {"projector_patch_to_query_dict": {49: 4}},
    "aya_vision": {"vision_config": {"image_size": 56}},
    "exaone4_5_vision": _WINDOWS,
    "gemma3": {"mm_tokens_per_image": 49},
    "gemma4": {
        "vision_config": {
            "model_type": "gemma4_vision",
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 16,
        },
        "image_token_id": 3,
    },
    # By default its images have 4,096 patches, all of which attend to each other.
    "got_ocr2": {"vision_config": {"image_size": 256}},
    # Its images pass one more norm if the text model has MTP layers.
    "nemotron_h_omni": {
        "image_token_id": 3,
        "text_config": {"num_nextn_predict_layers": 2},
    },
    "qwen2_5_omni_vision_encoder": _WINDOWS,
    "qwen2_5_vl_vision": _WINDOWS,
    "vipllava": {"vision_feature_layers": [-2, -4, 1]},
    # Their own towers need the package timm.
    "fast_vlm": {"vision_config": _VISION},
    "perception_lm": {"vision_config": {**_VISION, "model_args": {"embed_dim": 64}}},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 6},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 6},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [16, 16],
        "axial_pos_embds_dim": [16, 48],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
    },
    "step3p5": {"sliding_window": 8},
    "xmod": {"default_language": "en_XX"},
    # Sizes in fields with unusual names.
    "dory": {"n_input_layers": 2, "n_output_layers": 2},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [48, 32]},
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"] * 3},
    "gemma4_assistant": {
        "text_config": {
            "num_hidden_layers": 6,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "num_kv_shared_layers": 6,
        }
    },
    "gemma4_unified_assistant": {"text_config": {"num_kv_shared_layers": 6}},
    "gpt_neo": {"attention_types": [[["global", "local"], 3]]},
    # Half the width must be a multiple of 64, or cache and states have different shapes.
    "xlstm": {"hidden_size": 128},
    "zamba": {"layers_block_type": [*["linear_attention"] * 2, "hybrid"] * 2},
    # Width of the features after the pixel shuffle.
    "llama4_vision_model": {"intermediate_size": 256},
    "kosmos-2.5": {"latent_query_num": 16},
    "inkling_vision": {"patch_size": 8},
    "molmo2": {"adapter_config": {"vision_feature_layer": [3, 1]}},
    "mamba2": {"num_heads": 8},
}
