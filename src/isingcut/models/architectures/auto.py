"""Which transformers class builds a checkpoint's model: causal, or image-text-to-text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from isingcut.errors import ArchitectureError
from isingcut.models.checkpoint.read import read_config
from isingcut.models.loading import loading
from isingcut.models.transformers_private import model_classes

# Configuration classes that no auto class of transformers lists, and what builds their models;
# registered in this process alone.
_ALONE: dict[type, str] = {}


def auto_class(config: Any) -> Any:
    """The auto class that builds the model that a configuration's ``architectures`` names.

    Where that says nothing, the causal one if both know ``config``. A multimodal model that the
    image-text-to-text class builds has a text decoder, and is called with text alone.

    Args:
        config: a loaded configuration.

    Raises:
        ArchitectureError: neither knows it.
    """
    import transformers

    factories: list[Any] = [
        transformers.AutoModelForCausalLM,
        transformers.AutoModelForImageTextToText,
    ]
    remote = getattr(config, "auto_map", None) or {}
    if named := [f for f in factories if f.__name__ in remote]:
        return named[0]
    known = [f for f in factories if type(config) in model_classes(f)]
    # Of a multimodal checkpoint the causal class may be one that only its text part fits.
    saved = getattr(config, "architectures", None) or []
    for factory in known:
        if model_classes(factory)[type(config)].__name__ in saved:
            return factory
    if known:
        return known[0]
    for name in saved:
        own: Any = getattr(transformers, name, None)
        if _loads_alone(own, config):
            factories[0].register(type(config), own, exist_ok=True)
            _ALONE[type(config)] = own.__name__
            return factories[0]
    raise ArchitectureError(
        f"transformers has no text-generating decoder of the model type {config.model_type!r}; "
        "isingcut cuts decoders with one stack of residual blocks"
    )


def _loads_alone(own: Any, config: Any) -> bool:
    """Whether a class builds a text-generating model that no auto class lists.

    Such is the decoder of a multimodal model, saved without the rest.
    """
    return (
        getattr(own, "config_class", None) is type(config)
        and own.can_generate()
        and own.main_input_name == "input_ids"
        and not getattr(config, "is_encoder_decoder", False)
    )


def auto_class_of(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """`auto_class` of the configuration in a checkpoint folder."""
    return auto_class(_config_of(folder, trust_remote_code))


def loading_class_of(folder: Path, *, trust_remote_code: bool = False) -> str:
    """The name of the class that loads a checkpoint in transformers where isingcut is not."""
    config = _config_of(folder, trust_remote_code)
    name: str = auto_class(config).__name__
    return _ALONE.get(type(config), name)


def _config_of(folder: Path, trust: bool) -> Any:
    from transformers import AutoConfig

    configs: Any = AutoConfig
    # First, as transformers would look for a folder that was deleted on the hub.
    read_config(folder)
    with loading(f"the configuration in {folder}"):
        return configs.from_pretrained(folder, trust_remote_code=trust)
