"""Tiny random models of every supported family, with a tiny tokenizer, made without a network.

The per-layer fields of their configurations vary with depth.
"""

from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

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

_TABLE: dict[str, dict[str, Any]] = yaml.safe_load(
    Path(__file__).with_name("families.yaml").read_text(encoding="utf-8")
)
FAMILIES: dict[str, dict[str, Any]] = _TABLE["families"]
"""Fields that each family adds to or changes in the base; None removes a field of the base."""


CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_config(family: str, **changes: Any) -> Any:
    """Make the configuration of the tiny model of ``family``, with ``changes`` applied."""
    own = {**FAMILIES[family], **changes}
    model_type = own.pop("model_type", family)
    default = AutoConfig.for_model(model_type).to_dict()
    shared = {k: v for k, v in _TABLE["shared"].items() if default.get(k) is not None}
    values = {k: v for k, v in {**BASE, **shared, **own}.items() if v is not None}
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
        factory: auto class that builds the model.
        config: configuration of the model.
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
                    parameter.copy_(
                        torch.randn_like(parameter) * parameter.shape[-1] ** -0.5
                    )
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            for name, buffer in model.named_buffers():
                if name.endswith("layer_scalar"):
                    buffer.fill_(0.5)
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


def tiny_checkpoint(
    family: str, folder: Path, *, seed: int = 0, **changes: Any
) -> Path:
    """Save `tiny_model` and `tiny_tokenizer` to ``folder`` as an ordinary checkpoint.

    Returns:
        ``folder``.
    """
    tiny_model(family, seed=seed, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
