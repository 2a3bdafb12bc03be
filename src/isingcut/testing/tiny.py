"""Tiny random models of every supported family, with a tiny tokenizer, made offline.

The per-layer fields of their configurations vary with depth.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 256 + 6

BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_MOE: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
_DEEPSEEK: dict[str, Any] = {
    "head_dim": None,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 2,
}
_MAMBA: dict[str, Any] = {"state_size": 8, "conv_kernel": 4, "expand": 2, "time_step_rank": 4}
_HYBRID: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}

# Fields that each family adds to or changes in the base; None removes a base field.
# Per-layer fields vary with depth.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama4": {
        "model_type": "llama4_text",
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 48,
        "interleave_moe_layer_step": 2,
        "no_rope_layer_interval": 3,
        "attention_chunk_size": 8,
    },
    "qwen2": {
        "head_dim": None,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 3,
    },
    "qwen2_moe": {
        **_MOE,
        "head_dim": None,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 4,
    },
    "qwen3": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 4},
    "qwen3_moe": {**_MOE, "decoder_sparse_step": 1, "mlp_only_layers": [0, 4]},
    "qwen3_next": {
        **_MOE,
        "layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "mlp_only_layers": [1],
    },
    "mistral": {"sliding_window": 8},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3": {
        "model_type": "gemma3_text",
        "sliding_window": 8,
        "sliding_window_pattern": 3,
        "query_pre_attn_scalar": 8,
    },
    "gemma3n": {
        "model_type": "gemma3n_text",
        "num_hidden_layers": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 4,
        "num_kv_shared_layers": 3,
        "sliding_window": 8,
        "activation_sparsity_pattern": [0.5, 0.5, 0.3, 0.0, 0.0, 0.0, 0.0, 0.0],
        "intermediate_size": [48, 48, 32, 48, 48, 32, 48, 48],
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY,
        "laurel_rank": 8,
        "altup_num_inputs": 2,
    },
    "gemma4": {
        "model_type": "gemma4_text",
        "num_hidden_layers": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 4,
        "num_kv_shared_layers": 3,
        "sliding_window": 8,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY,
    },
    "phi3": {"head_dim": None},
    "gpt2": {},
    "gpt_neo": {
        "num_layers": 6,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 3]],
        "window_size": 8,
        "num_key_value_heads": None,
        "num_attention_heads": None,
        "num_hidden_layers": None,
        "head_dim": None,
    },
    "gpt_neox": {"head_dim": None, "num_key_value_heads": None},
    "opt": {
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
        "head_dim": None,
        "num_key_value_heads": None,
        "intermediate_size": None,
    },
    "bloom": {"n_layer": 6, "n_head": 4, "num_hidden_layers": None, "head_dim": None},
    "falcon": {"head_dim": None, "num_key_value_heads": None},
    "starcoder2": {"head_dim": None, "sliding_window": 8},
    "olmo2": {"head_dim": None},
    "olmo3": {"head_dim": None, "sliding_window": 8},
    "smollm3": {
        "head_dim": None,
        "no_rope_layer_interval": 3,
        "use_sliding_window": True,
        "sliding_window": 8,
    },
    "cohere2": {"sliding_window": 8},
    "exaone4": {"sliding_window": 8, "sliding_window_pattern": 3},
    "glm4_moe": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 2,
    },
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 16,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 4,
    },
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "mamba": {**_MAMBA, "intermediate_size": None, "head_dim": None},
    "mamba2": {
        "state_size": 8,
        "num_heads": 8,
        "head_dim": 8,
        "n_groups": 1,
        "chunk_size": 8,
        "intermediate_size": None,
    },
    "falcon_mamba": {**_MAMBA, "intermediate_size": None, "head_dim": None},
    "jamba": {
        "head_dim": None,
        "num_hidden_layers": 12,
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 4,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "bamba": {**_HYBRID, "head_dim": None, "attn_layer_indices": [1, 4]},
    "falcon_h1": {**_HYBRID, "mamba_d_ssm": 64, "head_dim": None},
    "zamba2": {
        "head_dim": None,
        "num_hidden_layers": 8,
        "layers_block_type": ["mamba", "mamba", "hybrid", "mamba"] * 2,
        "mamba_d_state": 8,
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "chunk_size": 8,
        "num_mem_blocks": 2,
        "use_shared_attention_adapter": True,
        "adapter_rank": 4,
        "num_key_value_heads": 4,
    },
    "granitemoehybrid": {
        **_HYBRID,
        "head_dim": None,
        "layer_types": ["mamba", "mamba", "attention"] * 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 16,
    },
    "nemotron_h": {
        "num_hidden_layers": None,
        "layers_block_type": ["mamba", "moe", "attention", "mlp", "mamba", "moe", "attention"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
    },
    "lfm2": {
        "head_dim": None,
        "layer_types": ["conv", "full_attention", "conv"] * 2,
        "full_attn_idxs": [1, 4],
        "block_multiple_of": 8,
    },
    "recurrent_gemma": {
        "lru_width": 32,
        "attention_window_size": 8,
        "num_key_value_heads": 1,
        "head_dim": None,
    },
    "rwkv": {"attention_hidden_size": 32, "context_length": 128, "rescale_every": 2},
}


CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_config(family: str, **changes: Any) -> Any:
    """Make the configuration of the tiny model of ``family``, with ``changes`` applied."""
    values = {**BASE, **FAMILIES[family], **changes}
    model_type = values.pop("model_type", family)
    values = {k: v for k, v in values.items() if v is not None}
    return AutoConfig.for_model(model_type, **values)


def tiny_model(family: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Make a tiny random float32 model of ``family`` in evaluation mode.

    Every parameter is random (normal, with norms around their initial value), so that no two blocks
    compute the same and no gate, bias or scale is zero.

    Args:
        family: a key of `FAMILIES`.
        seed: seed of the weights; the global random state does not change.
        changes: configuration fields to set.
    """
    return random_model(AutoModelForCausalLM, tiny_config(family, **changes), seed)


def random_model(factory: Any, config: Any, seed: int = 0) -> PreTrainedModel:
    """Make a float32 model in evaluation mode, with random parameters as in `tiny_model`.

    Args:
        factory: the auto class that builds it.
        config: its configuration.
        seed: seed of the weights; the global random state does not change.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = factory.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.is_floating_point():
                    continue
                if parameter.ndim >= 2 and parameter.shape[-1] > 1:
                    parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = 0
    model.train(False)
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Make a byte-level tokenizer without merges and with a chat template; 262 ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    factory: Any = PreTrainedTokenizerFast
    fast: PreTrainedTokenizerFast = factory(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=special[3:],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_checkpoint(family: str, folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Save `tiny_model` and `tiny_tokenizer` to ``folder`` as an ordinary checkpoint.

    Returns:
        ``folder``.
    """
    model = tiny_model(family, seed=seed, **changes)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return Path(folder)
