"""Tiny configurations of any class of transformers, derived by rule from its own defaults.

A field is shrunk by its name and by what its default is. All widths become one width, all head
counts one count, and so on, so that fields which have to agree agree without being known to
belong together: a vision tower is as wide as the decoder that reads it. What a class derives
from other fields (``layer_types`` from the depth, ``head_dim`` from the width) it derives anew.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from transformers import PreTrainedConfig

WIDTH, HEADS, HEAD_DIM, INNER = 64, 4, 16, 96
# Ids of an image and the like come first, where random tokens are not drawn from.
VOCABULARY = 256 + 6
DEPTH, TOWER_DEPTH = 6, 4

_DEPTH = re.compile(
    r"num_hidden_layers|n_layers?|num_layers|(encoder|decoder)_layers|depth|layers"
    r"|num_(encoder|decoder|lstm)_layers|num_blocks|resampler_depth"
    r"|(conf|decoder|resampler)_num_(hidden_)?layers"
)
# The patterns behind a size match whole names; the first that does decides. Only numbers are
# shrunk: switches and fractions stay.
_SIZES: tuple[tuple[int, str], ...] = (
    # Ids of tokens.
    (0, "pad_token_id"),
    (1, "(decoder_start|bos)_token_id"),
    (2, "(forced_)?eos_token_id sep_token_id"),
    (3, "(image|img|media_placeholder)_token(_id|_index)?"),
    (4, "video_token(_id|_index)?"),
    (5, "audio_token(_id|_index)?"),
    (6, r"(vision|image|im)_(start|bos)_token_id boi_token_(id|index)"),
    (7, r"\w*(token|start|end|newline|bos|eos|pad)_(id|index) (unk|mask)_index \w*_token"),
    # Tables.
    (2, "(type|task_type|additional)_vocab_size"),
    (64, r"(codebook|audio_vocab|mel_vocab|num_embeddings|num_embeds)\w*"),
    (VOCABULARY, r"\w*vocab_size\w* encoder_hash_byte_group_vocab"),
    (256, "max_position_embeddings n_positions n_ctx max_seq_len max_(source|target)_positions"),
    (128, "original_max_position_embeddings context_length model_max_length"),
    (8, "sliding_window(_size)? (attention_)?window_size attention_chunk_size"),
    # Attention.
    (HEADS // 2, r"\w*kv_heads \w*key_value_heads num_query_groups kv_n_heads"),
    (8, "linear_num(_value)?_heads mamba_n(um)?_heads n_mamba_heads"),
    (HEADS, r"\w*_heads n_heads? num_centroids"),
    (8, "qk_rope_head_dim rotary_dim"),
    (HEAD_DIM + 8, "qk_head_dim"),
    (HEAD_DIM, r"\w*head_dim\w* \w*d_head kv_channels d_kv dim_head attention_head_size"),
    (HEAD_DIM, "mamba_headdim"),
    (16, r"\w+_rank"),
    # Experts.
    (2, "num_experts_per_tok(en)? moe_top_?k moe_k top_k_experts"),
    (4, r"\w*num_(local_)?experts n_routed_experts"),
    (1, r"\w*n(um)?_shared_experts? topk_group"),
    (2, "n_group num_expert_group"),
    (2, "first_k_dense_replace num_dense_layers moe_layer_start_index"),
    (4, "moe_layer_end_index"),
    (3, "max_window_layers"),
    (8, "index_topk indexer_budget"),
    # Recurrent states.
    (16, r"\w*state_size \w*d_state"),
    (1, "(mamba_)?n_?groups"),
    (8, "(mamba_)?chunk_size"),
    (2 * WIDTH, "mamba_d_ssm lru_width"),
    # Widths.
    (INNER, r"\w*(intermediate|ffn_dim|ffn_hidden|feed_forward)\w* d_ff dff dim_ff n_inner"),
    (INNER, "mlp_dim d_inner share_expert_dim"),
    (WIDTH, r"\w*hidden_(size|dim)\w* d_model n_embd \w*embed_dim embedding_(size|dim)"),
    (WIDTH, r"dim width emb_dim"),
    (WIDTH, r"(vision_)?(out|output|projector|projection|adapter)_\w*(dim|size|channels)"),
)
_NAMED = [(re.compile("|".join(names.split())), size) for size, names in _SIZES]
_BLOCK_LISTS = re.compile(r".*(index|idx|_layers?|_ids|layer_ids|block).*")


def tiny_values(cls: type[Any], depth: int = DEPTH) -> dict[str, Any]:
    """Arguments that make a configuration class describe a tiny model.

    Args:
        cls: a configuration class of transformers.
        depth: blocks of the decoder; other towers get `TOWER_DEPTH`.

    Returns:
        arguments of the class, nested configurations as dictionaries.
    """
    return _shrunk(cls(), depth)


def _shrunk(default: Any, depth: int) -> dict[str, Any]:
    values: dict[str, Any] = {}
    given = _declared(type(default))
    old_depth = _old_depth(default)
    for name, part in vars(default).items():
        if hasattr(part, "to_dict") and hasattr(part, "model_type"):
            inner = depth if _is_text(name) else TOWER_DEPTH
            values[name] = {"model_type": part.model_type, **_shrunk(part, inner)}
    for name, value in given.items():
        if name not in values and value is not None:
            small = _small(name, value, old_depth, depth, given)
            if small is not _KEEP:
                values[name] = small
    return values


_KEEP: Any = object()


def _is_text(name: str) -> bool:
    return not re.search(r"vision|audio|image|speech|protein|encoder|vq|perceiver|qformer", name)


def _declared(cls: type[Any]) -> dict[str, Any]:
    """What a class declares: field -> its default, before anything is derived from others."""
    base = {f.name for f in dataclasses.fields(cls.__mro__[_base_at(cls)])}
    found = {}
    for field in dataclasses.fields(cls):
        if field.name in base and field.name not in ("is_decoder",):
            continue
        if field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
    return found


def _base_at(cls: type[Any]) -> int:
    return cls.__mro__.index(PreTrainedConfig)


def _old_depth(default: Any) -> int:
    for name, value in vars(default).items():
        if _DEPTH.fullmatch(name) and isinstance(value, int) and value > 0:
            return value
    value = getattr(default, "num_hidden_layers", 0)
    return value if isinstance(value, int) else 0


def _small(name: str, value: Any, old: int, depth: int, given: dict[str, Any]) -> Any:
    if isinstance(value, (bool, str, float)):
        return _KEEP
    if isinstance(value, int):
        if _DEPTH.fullmatch(name):
            return min(value, depth)
        size = _named(name)
        if size is None:
            return _KEEP
        if name.endswith(("key_value_heads", "kv_heads")) and value == given.get(
            "num_attention_heads"
        ):
            return HEADS
        return min(value, size) if value >= 0 else _KEEP
    if isinstance(value, (list, tuple)) and value and old:
        return _list(name, list(value), old, depth)
    return _KEEP


def _list(name: str, value: list[Any], old: int, depth: int) -> Any:
    if len(value) == old and old > depth:
        return spread(value, depth)
    numbers = all(isinstance(v, int) and not isinstance(v, bool) for v in value)
    if numbers and _BLOCK_LISTS.fullmatch(name) and max(value) >= depth and max(value) < old + 1:
        return sorted({v * depth // (old + 1) for v in value})
    return _KEEP


def spread(values: list[Any], count: int) -> list[Any]:
    """``count`` of a longer list's entries, in order, with as many different ones as can be."""
    kept = [round(i * (len(values) - 1) / (count - 1)) for i in range(count)]
    first: dict[Any, int] = {}
    for i, entry in enumerate(values):
        first.setdefault(repr(entry), i)
    for i in list(first.values())[:count]:
        if repr(values[i]) not in {repr(values[k]) for k in kept}:
            # The neighbour of a like entry makes room.
            seen = [repr(values[k]) for k in kept]
            twice = next((n for n, s in enumerate(seen) if seen.count(s) > 1), None)
            if twice is not None:
                kept[twice] = i
                kept.sort()
    return [values[k] for k in kept]


def _named(name: str) -> int | None:
    return next((size for pattern, size in _NAMED if pattern.fullmatch(name)), None)
