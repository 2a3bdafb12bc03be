"""Tiny random models of families that have something per-layer of their own."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from isingcut.models.architectures.auto import auto_class
from isingcut.testing.configurations import _DEEPSEEK, BASE
from isingcut.testing.tiny import random_model, tiny_tokenizer

INDEXED: dict[str, Any] = {
    **_DEEPSEEK,
    "n_group": 1,
    "first_k_dense_replace": 1,
    "index_topk": 4,
    "index_head_dim": 8,
    "index_n_heads": 2,
}
LINEAR: dict[str, Any] = {"linear_head_dim": 8, "linear_num_heads": 4}
GATED: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
FULL, SLIDING, LINEAR_TYPE = "full_attention", "sliding_attention", "linear_attention"
MOE_ODD = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
ODD: dict[str, dict[str, Any]] = {
    "glm_moe_dsa": {
        **INDEXED,
        "indexer_types": ["full", "full", "shared", "shared", "full", "shared"],
    },
    "hy_v4": {**INDEXED, "hc_mult": 2},
    "beam": {**MOE_ODD, "sliding_window": 8},
    "minicpm3": {**_DEEPSEEK, "scale_depth": 1.4, "dim_model_base": 32},
    "modernbert-decoder": {"local_attention": 8, "head_dim": None, "num_key_value_heads": None},
    "kimi_linear": {
        **_DEEPSEEK,
        **LINEAR,
        "q_lora_rank": None,
        "n_group": 1,
        "num_local_experts": 4,
        "n_routed_experts": None,
        "layer_types": [LINEAR_TYPE, LINEAR_TYPE, FULL] * 2,
        "mlp_layer_types": ["dense"] + ["sparse"] * 5,
    },
    "bailing_hybrid": {
        **_DEEPSEEK,
        "layer_group_size": 3,
        "first_k_dense_replace": 1,
        "num_experts": 4,
        "n_routed_experts": None,
    },
    "olmo_hybrid": {**GATED, "head_dim": None, "layer_types": [LINEAR_TYPE, LINEAR_TYPE, FULL] * 2},
    "exaone_moe": {
        **MOE_ODD,
        "first_k_dense_replace": 1,
        "sliding_window": 8,
        "sliding_window_pattern": 3,
    },
    "longcat_flash": {
        **_DEEPSEEK,
        "head_dim": 8,
        "num_hidden_layers": None,
        "num_layers": 4,
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 16,
        "moe_topk": 2,
        "zero_expert_num": 2,
    },
    "qwen4_exp_text": {
        **GATED,
        **MOE_ODD,
        "shared_expert_intermediate_size": 16,
        "hc_count": 2,
        "hc_lowrank": 8,
        "layer_types": [LINEAR_TYPE, LINEAR_TYPE, "indexed_attention"] * 2,
        "ple_layer_ids": [1, 2, 5],
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 50,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 1,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "hrm_text": {"H_cycles": 1, "L_cycles": 2},
    "xlstm": {"num_heads": 2, "head_dim": None},
    "step3p7": {
        "text_config": {
            **BASE,
            "num_nextn_predict_layers": 2,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "share_expert_dim": 16,
            "sliding_window": 8,
            "layer_types": [FULL, SLIDING, SLIDING, FULL, FULL, SLIDING, SLIDING, SLIDING],
            "moe_layers_enum": "2,3,4,5,6,7",
            "rope_theta": [1e6, 1e4, 1e4, 1e6, 1e6, 1e4, 1e4, 1e4],
            "partial_rotary_factors": [0.5, 1.0, 1.0, 0.5, 0.5, 1.0, 1.0, 1.0],
            "swiglu_limits": [0.0, 0.0, 0.0, 0.5, 0.0, 0.7, 0.0, 0.0],
            "swiglu_limits_shared": [0.0, 0.0, 0.0, 0.0, 0.9, 0.0, 0.0, 0.0],
        },
        "vision_config": {"width": 32, "layers": 2, "heads": 2, "image_size": 28, "patch_size": 14},
    },
    "ernie4_5_vl_moe": {
        "text_config": {
            **BASE,
            "head_dim": None,
            "moe_intermediate_size": [16, 8],
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_num_shared_experts": 1,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [1, 1, 2],
                "rope_theta": 1e4,
            },
        },
        "vision_config": {**VISION, "depth": 2, "num_heads": 2},
    },
    "glm5_next": {
        "text_config": {
            **BASE,
            **INDEXED,
            **LINEAR,
            "qk_rope_head_dim": 0,
            "hc_mult": 2,
            "index_kpool": 2,
            "layer_types": [LINEAR_TYPE, "indexed_attention", "indexed_attention"] * 2,
            "indexer_types": ["full", "full", "shared"] * 2,
        },
        "vision_config": {**VISION, "out_hidden_size": 32, "projection_intermediate_size": 32},
    },
    "mistral_large4": {
        "text_config": {
            **BASE,
            **INDEXED,
            "kv_source_layers": [0, 1, 1, 3, 4, 4],
            "indexer_types": ["full", "full", "shared", "full", "full", "full"],
            "no_rope_layers": [1, 1, 1, 1, 0, 0],
        },
        "vision_config": VISION,
    },
}


# What the model's own repository holds as config.json, for models of `ODD`.
HUB: dict[str, dict[str, Any]] = {
    "step3p7": {
        "model_type": "step3p7",
        "text_config": {"model_type": "step3p5", **ODD["step3p7"]["text_config"]},
        "vision_config": ODD["step3p7"]["vision_config"],
    },
    "kimi_linear": {
        **{
            k: v
            for k, v in {**BASE, **ODD["kimi_linear"]}.items()
            if v is not None and "layer_types" not in k and "linear_" not in k
        },
        "model_type": "kimi_linear",
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 0,
        "linear_attn_config": {
            "full_attn_layers": [3, 6],
            "kda_layers": [1, 2, 4, 5],
            "head_dim": 8,
            "num_heads": 4,
            "short_conv_kernel_size": 4,
        },
    },
    "exaone_moe": {
        **{k: v for k, v in {**BASE, **ODD["exaone_moe"]}.items() if v is not None},
        "model_type": "exaone_moe",
        "layer_types": [SLIDING, SLIDING, FULL] * 2,
        "is_moe_layer": [False] + [True] * 5,
    },
    "olmo_hybrid": {
        **{k: v for k, v in {**BASE, **ODD["olmo_hybrid"]}.items() if v is not None},
        "model_type": "olmo_hybrid",
        "fla_hybrid_attention_indices": [2, 5],
    },
}


def odd_config(model_type: str, **changes: Any) -> Any:
    """The family's tiny configuration; ``changes`` are of its decoder."""
    values = dict(ODD[model_type])
    if "text_config" in values:
        values["text_config"] = _given({**values["text_config"], **changes})
    else:
        values = _given({**BASE, **values, **changes})
    return AutoConfig.for_model(model_type, **values)


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if v is not None}


def odd_model(model_type: str, **changes: Any) -> Any:
    config = odd_config(model_type, **changes)
    return random_model(auto_class(config), config)


def odd_checkpoint(model_type: str, folder: Path, **changes: Any) -> Any:
    """Write the model and a tokenizer to ``folder``; the model."""
    model = odd_model(model_type, **changes)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model
