"""Tiny random multimodal models, and the flat form of their configurations that hubs hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from isingcut.testing.tiny import tiny_tokenizer

TEXT: dict[str, Any] = {
    "vocab_size": 262,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_VISION = {"depth": 4, "hidden_size": 32, "num_heads": 2, "patch_size": 4}
_MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
_IMAGES = {
    "image_token_id": 8,
    "video_token_id": 9,
    "vision_start_token_id": 10,
    "vision_end_token_id": 11,
}
_HEADS = {"head_dim": 8}

COMPOSITES: dict[str, dict[str, Any]] = {
    "emu3": {
        "text_config": TEXT,
        "vq_config": {
            "codebook_size": 16,
            "embed_dim": 8,
            "z_channels": 8,
            "latent_channels": 8,
            "hidden_channels": 32,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "attn_resolutions": [],
        },
        "vocabulary_map": {"<image>": 8},
    },
    "gemma4": {
        "text_config": {
            **TEXT,
            **_HEADS,
            "global_head_dim": 8,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 262,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 0,
            "sliding_window": 8,
        },
        "vision_config": {**VISION, "head_dim": 16, "global_head_dim": 16},
        "audio_config": None,
    },
    "hunyuan_vl": {
        "text_config": {
            **TEXT,
            **_HEADS,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [1, 1, 1, 1],
            },
        },
        "vision_config": {
            **VISION,
            "out_hidden_size": 32,
            "max_image_size": 64,
            "min_image_size": 28,
        },
    },
    "llama4": {
        "text_config": {
            **TEXT,
            **_HEADS,
            "num_local_experts": 4,
            "intermediate_size_mlp": 48,
            "interleave_moe_layer_step": 2,
            "no_rope_layer_interval": 3,
            "attention_chunk_size": 8,
        },
        "vision_config": {
            **VISION,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        },
    },
    "mllama": {
        "text_config": {**TEXT, "cross_attention_layers": [1]},
        "vision_config": {
            **VISION,
            "num_global_layers": 1,
            "attention_heads": 2,
            "vision_output_dim": 64,
            "intermediate_layers_indices": [1],
            "supported_aspect_ratios": [[1, 1]],
        },
    },
    "paddleocr_vl": {
        "text_config": {**TEXT, **_HEADS, "rope_parameters": _MROPE},
        "vision_config": VISION,
        **_IMAGES,
    },
    "qwen2_5_vl": {
        "text_config": {**TEXT, "rope_parameters": _MROPE},
        "vision_config": {
            **_QWEN_VISION,
            "intermediate_size": 32,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
        },
        **_IMAGES,
    },
    "qwen2_vl": {
        "text_config": {**TEXT, "rope_parameters": _MROPE},
        "vision_config": {**_QWEN_VISION, "embed_dim": 32, "mlp_ratio": 2},
        **_IMAGES,
    },
}


def composite(family: str) -> Any:
    """A tiny random float32 model of a multimodal family, every weight drawn anew."""
    config = AutoConfig.for_model(family, **COMPOSITES[family])
    factory: Any = AutoModelForImageTextToText
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = factory.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    model.generation_config.pad_token_id = 0
    return model.requires_grad_(False)


def composite_checkpoint(family: str, folder: Path, *, flat: bool = False) -> Any:
    """Save `composite` and a tokenizer to ``folder``; the model.

    Args:
        flat: with the text's fields at the root of ``config.json``, as hubs hold it.
    """
    model = composite(family)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    if flat:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        text = config.pop("text_config")
        for of_class in ("model_type", "architectures"):
            text.pop(of_class, None)
        (folder / "config.json").write_text(json.dumps({**text, **config}), encoding="utf-8")
    return model
