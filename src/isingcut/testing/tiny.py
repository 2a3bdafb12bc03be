"""Tiny random models of every supported family, with a tiny tokenizer, made offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from isingcut.testing.configurations import BASE, FAMILIES

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_config(family: str, **changes: Any) -> Any:
    """The configuration of the tiny model of ``family``, with ``changes`` applied."""
    values = {**BASE, **FAMILIES[family], **changes}
    model_type = values.pop("model_type", family)
    values = {k: v for k, v in values.items() if v is not None}
    return AutoConfig.for_model(model_type, **values)


def tiny_model(family: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A tiny random float32 model of ``family`` in evaluation mode.

    Every parameter is drawn anew (normal, with norms around their initial value), so that no
    two blocks compute the same and no gate, bias or scale is trivially zero.

    Args:
        family: a key of `FAMILIES`.
        seed: of the weights; the global random state is left alone.
        changes: configuration fields to set.
    """
    return random_model(AutoModelForCausalLM, tiny_config(family, **changes), seed)


def random_model(factory: Any, config: Any, seed: int = 0) -> PreTrainedModel:
    """A float32 model in evaluation mode, every parameter drawn anew as `tiny_model` does.

    Args:
        factory: the auto class that builds it.
        config: its configuration.
        seed: of the weights; the global random state is left alone.
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
    """A byte-level tokenizer without merges and with a chat template; 262 ids."""
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
