"""Tiny random models of families with unusual per-layer settings, or that take images.

`ODD` holds families whose config.json on the hub (`HUB`) differs; the others are derived by rule.
"""

import yaml
from transformers import AutoConfig, AutoModelForImageTextToText

from isingcut.models.load import find_auto_class
from isingcut.testing.tiny import BASE
from shared import load_json, save_json
from sweep.shrink import tiny_configuration
from tiny import excise, random_model, tiny_tokenizer, verify

FULL = "full_attention"
SLIDING = "sliding_attention"
ODD = yaml.safe_load("""
kimi_linear:
  linear_head_dim: 8
  linear_num_heads: 4
  head_dim: null
  num_key_value_heads: 4
  qk_nope_head_dim: 8
  qk_rope_head_dim: 8
  v_head_dim: 8
  kv_lora_rank: 16
  n_group: 1
  topk_group: 1
  num_local_experts: 4
  n_shared_experts: 1
  num_experts_per_tok: 2
  moe_intermediate_size: 16
  first_k_dense_replace: 2
  layer_types:
    [linear_attention, linear_attention, full_attention,
     linear_attention, linear_attention, full_attention]
  mlp_layer_types: [dense, sparse, sparse, sparse, sparse, sparse]
olmo_hybrid:
  linear_num_key_heads: 2
  linear_num_value_heads: 4
  linear_key_head_dim: 8
  linear_value_head_dim: 8
  head_dim: null
  layer_types:
    [linear_attention, linear_attention, full_attention,
     linear_attention, linear_attention, full_attention]
exaone_moe:
  moe_intermediate_size: 16
  num_experts: 4
  num_experts_per_tok: 2
  head_dim: 8
  first_k_dense_replace: 1
  sliding_window: 8
  sliding_window_pattern: 3
step3p7:
  text_config:
    num_nextn_predict_layers: 2
    moe_intermediate_size: 16
    n_routed_experts: 4
    num_experts_per_tok: 2
    share_expert_dim: 16
    sliding_window: 8
    layer_types:
      [full_attention, sliding_attention, sliding_attention, full_attention,
       full_attention, sliding_attention, sliding_attention, sliding_attention]
    moe_layers_enum: "2,3,4,5,6,7"
    rope_theta: [1000000.0, 10000.0, 10000.0, 1000000.0, 1000000.0, 10000.0, 10000.0, 10000.0]
    partial_rotary_factors: [0.5, 1.0, 1.0, 0.5, 0.5, 1.0, 1.0, 1.0]
    swiglu_limits: [0.0, 0.0, 0.0, 0.5, 0.0, 0.7, 0.0, 0.0]
    swiglu_limits_shared: [0.0, 0.0, 0.0, 0.0, 0.9, 0.0, 0.0, 0.0]
  vision_config: {width: 32, layers: 2, heads: 2, image_size: 28, patch_size: 14}
""")
ODD["step3p7"]["text_config"] = {**BASE, **ODD["step3p7"]["text_config"]}


def _given(values):
    return {k: v for k, v in values.items() if v is not None}


# Contents of config.json in the model's own repository, for models of `ODD`.
HUB = {
    "step3p7": {
        "model_type": "step3p7",
        "text_config": {"model_type": "step3p5", **ODD["step3p7"]["text_config"]},
        "vision_config": ODD["step3p7"]["vision_config"],
    },
    "kimi_linear": {
        **{
            k: v
            for k, v in _given({**BASE, **ODD["kimi_linear"]}).items()
            if "layer_types" not in k and "linear_" not in k
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
        **_given({**BASE, **ODD["exaone_moe"]}),
        "model_type": "exaone_moe",
        "layer_types": [SLIDING, SLIDING, FULL] * 2,
        "is_moe_layer": [False] + [True] * 5,
    },
    "olmo_hybrid": {
        **_given({**BASE, **ODD["olmo_hybrid"]}),
        "model_type": "olmo_hybrid",
        "fla_hybrid_attention_indices": [2, 5],
    },
}


def odd_config(model_type, **changes):
    """Return the family's tiny configuration; ``changes`` apply to its decoder."""
    if model_type not in ODD:
        config = tiny_configuration(model_type)
        text = config.get_text_config(decoder=True)
        for name, value in changes.items():
            setattr(text, name, value)
        return config
    return AutoConfig.for_model(
        model_type, **_given({**BASE, **ODD[model_type], **changes})
    )


def odd_model(model_type, **changes):
    config = odd_config(model_type, **changes)
    return random_model(find_auto_class(config), config)


def odd_checkpoint(model_type, folder, **changes):
    """Write the model and a tokenizer to ``folder``; return the model."""
    model = odd_model(model_type, **changes)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


def composite(family, **changes):
    """Return a tiny random float32 model of a multimodal family.

    Args:
        changes: configuration fields to set.
    """
    config = tiny_configuration(family)
    for name, value in changes.items():
        setattr(config, name, value)
    return random_model(AutoModelForImageTextToText, config).requires_grad_(False)


def composite_checkpoint(family, folder, *, flat=False):
    """Save `composite` and a tokenizer to ``folder``; return the model.

    Args:
        flat: whether the text fields are at the root of ``config.json``, as on hubs.
    """
    model = composite(family)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    if flat:
        config = load_json(folder / "config.json")
        text = config.pop("text_config")
        for of_class in ("model_type", "architectures"):
            text.pop(of_class, None)
        save_json(folder / "config.json", {**text, **config})
    return model


def prove_cut(model, removed, folder, **options):
    """Cut ``source`` to ``out``, both in ``folder``, and return the proof against ``model``."""
    excise(folder / "source", removed, folder / "out")
    return verify(model, removed, folder / "out", **options)
