"""Which transformers class builds a checkpoint's model: causal, or image-text-to-text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from isingcut.errors import ArchitectureError
from isingcut.models.transformers_private import model_classes


def auto_class(config: Any) -> Any:
    """The auto class that knows ``config``; the causal one where both do.

    A multimodal model that only the image-text-to-text class knows still has a text decoder,
    and is called with text alone.

    Args:
        config: a loaded configuration.

    Raises:
        ArchitectureError: neither does.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    causal: Any = AutoModelForCausalLM
    multimodal: Any = AutoModelForImageTextToText
    remote = getattr(config, "auto_map", None) or {}
    for factory in (causal, multimodal):
        if factory.__name__ in remote or type(config) in model_classes(factory):
            return factory
    raise ArchitectureError(
        f"transformers has no text-generating decoder of the model type {config.model_type!r}; "
        "isingcut cuts decoders with one stack of residual blocks"
    )


def auto_class_of(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """`auto_class` of the configuration in a checkpoint folder."""
    from transformers import AutoConfig

    configs: Any = AutoConfig
    return auto_class(configs.from_pretrained(folder, trust_remote_code=trust_remote_code))
