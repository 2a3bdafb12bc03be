"""Tiny random models that take images, of the families whose text blocks and images meet."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

_TEXT: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_QWEN = {**_TEXT, "head_dim": 8, "rope_parameters": _MROPE}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_GRID: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "in_channels": 3,
    "patch_size": 4,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 2],
}
_TOKENS = {
    "image_token_id": 290,
    "video_token_id": 291,
    "vision_start_token_id": 292,
    "vision_end_token_id": 293,
}
_SQUARE: dict[str, Any] = {
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
# Digits as letters, as Chameleon spells its codes.
_CODES = {
    f"IMGIMG{str(i).translate(str.maketrans('01234567', 'ABCDEFGH'))}Z": 200 + i for i in range(8)
}

IMAGE_MODELS: dict[str, dict[str, Any]] = {
    "qwen3_vl": {"text_config": _QWEN, "vision_config": _GRID, **_TOKENS},
    "qwen3_vl_moe": {"text_config": {**_QWEN, **_MOE}, "vision_config": _GRID, **_TOKENS},
    "qwen3_omni_moe_thinker": {
        "text_config": {**_QWEN, **_MOE},
        "vision_config": _GRID,
        "audio_config": {
            "d_model": 16,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 16,
            "output_dim": 32,
            "num_mel_bins": 8,
        },
        "image_token_id": 290,
        "video_token_id": 291,
        "vision_start_token_id": 292,
        "audio_token_id": 294,
        "audio_start_token_id": 295,
    },
    "cohere_compass": {
        "text_config": {**_TEXT, "rope_parameters": {"full_attention": _MROPE}},
        "vision_config": _GRID,
        **_TOKENS,
    },
    "granite_docling": {
        "text_config": _TEXT,
        "vision_config": {
            **_SQUARE,
            "hidden_size": 16,
            "out_hidden_size": 32,
            "scale_factor": 2,
            "deepstack_visual_indexes": [0, 2],
            "use_fine_route": False,
        },
        "image_token_id": 290,
    },
    "granite4_vision": {
        "text_config": _TEXT,
        "vision_config": {"model_type": "clip_vision_model", **_SQUARE, "hidden_size": 64},
        "qformer_config": {
            "model_type": "blip_2_qformer",
            "num_hidden_layers": 1,
            "intermediate_size": 32,
        },
        "image_token_index": 290,
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[0, 0], [1, 1]],
        "spatial_target_layers": [2, 4, 4, 9],
        "image_grid_pinpoints": [[16, 16], [16, 32]],
    },
    "llava": {
        "text_config": {"model_type": "llama", **_TEXT},
        "vision_config": {"model_type": "clip_vision_model", **_SQUARE, "hidden_size": 16},
        "image_token_index": 290,
    },
    "chameleon": {
        **_TEXT,
        "vq_config": {
            "embed_dim": 8,
            "num_embeddings": 8,
            "latent_channels": 8,
            "resolution": 16,
            "base_channels": 32,
            "channel_multiplier": [1, 2],
            "num_res_blocks": 1,
        },
        "vocabulary_map": {"<image>": 290, **_CODES},
    },
}


def image_model(family: str, *, seed: int = 0, **changes: Any) -> Any:
    """The tiny random float32 model of ``family``, every parameter drawn anew."""
    config = AutoConfig.for_model(family, **{**IMAGE_MODELS[family], **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2 and parameter.shape[-1] > 1:
                    parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()
