"""Configurations for which the rules of `shrink` are not enough."""

from __future__ import annotations

from typing import Any

_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_TOWER = {
    "model_type": "siglip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
# Two merged patches a side.
_WINDOWS = {"window_size": 56}
_VISUAL_TOKENS = {f"<|visual token {i:06d}|>": 8 + i for i in range(64)}

# Model type of a configuration, whole or part -> arguments that join or replace those derived;
# dictionaries join recursively.
HANDS: dict[str, dict[str, Any]] = {
    # No block of the default is attention, and transformers cannot generate with such a model.
    "bamba": {"attn_layer_indices": [1, 4]},
    "granitemoehybrid": {"layer_types": ["mamba", "mamba", "attention"] * 2},
    # The default leaves open what the model needs.
    "apertus1p5": {"image_token_offset": 8, "audio_token_offset": 72},
    "blip-2": {"image_token_index": 3},
    "instructblip": {"image_token_index": 3},
    "instructblipvideo": {"video_token_index": 3},
    "chameleon": {
        # Few codes, with ids that random tokens do not have: their logits are masked.
        "vq_config": {"num_embeddings": 4},
        "vocabulary_map": {"<image>": 3, **{f"IMGIMG{c}Z": 4 + i for i, c in enumerate("ABCD")}},
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
        "vision_config": {**_TOWER, "model_type": "clip_vision_model", "image_size": 56},
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
    "hunyuan_vl_text": {
        "rope_parameters": {**_ROPE, "mrope_section": [2, 2, 2, 2]},
    },
    "paddleocr_vl_text": {"rope_parameters": {**_ROPE, "mrope_section": [2, 3, 3]}},
    # Images of as many patches as what reads them takes.
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
    "nemotron_h_omni": {"image_token_id": 3},
    "qwen2_5_omni_vision_encoder": _WINDOWS,
    "qwen2_5_vl_vision": _WINDOWS,
    "vipllava": {"vision_feature_layers": [-2, -4, 1]},
    # Their own towers need the package timm.
    "fast_vlm": {"vision_config": _TOWER},
    "perception_lm": {"vision_config": {**_TOWER, "model_args": {"embed_dim": 64}}},
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
    # Sizes under names of their own.
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
    # Half the width has to be whole 64s, or the cache has other shapes than the states.
    "xlstm": {"hidden_size": 128},
    "zamba": {
        "layers_block_type": [*["linear_attention"] * 2, "hybrid"] * 2,
    },
    # As many features as pixels are shuffled into one.
    "llama4_vision_model": {"intermediate_size": 256},
    "kosmos-2.5": {"latent_query_num": 16},
    "inkling_vision": {"patch_size": 8},
    "molmo2": {"adapter_config": {"vision_feature_layer": [3, 1]}},
    "mamba2": {"num_heads": 8},
}
