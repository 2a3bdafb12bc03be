"""Where in a ``config.json`` the decoder's fields stand, as transformers reads it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from isingcut.errors import ArchitectureError
from isingcut.models.architectures.fields import counted_by
from isingcut.models.loading import one_line, quiet_transformers

# What the decoder's part is called where transformers does not know the model type.
_NAMES = ("text_config", "llm_config", "language_config")


def text_part(config: dict[str, Any], derived: Any | None) -> dict[str, Any]:
    """The dictionary inside ``config``, or itself, that the decoder's fields are read from.

    Hubs hold multimodal configurations that lack the part their class has for the text: its
    fields stand at the root (Qwen2-VL) or in a part of another name. Writing the part beside them
    would hide them, so the place is found by changing a number and looking whether it is read.

    Args:
        config: a checkpoint's ``config.json``; a part that nothing speaks of is added, empty.
        derived: what transformers makes of it, as from `config_object`.
    """
    if derived is None:
        parts = (config[name] for name in _NAMES if isinstance(config.get(name), dict))
        return next(parts, config)
    path = path_of(derived, derived.get_text_config(decoder=True))
    text: Any = config
    for key in path:
        text = text.get(key) if isinstance(text, dict) else None
    if isinstance(text, dict):
        return text
    for place in _places(config):
        if _is_read(config, place):
            return config[place[0]] if place else config
    text = config
    for key in path:
        if not isinstance(text.get(key), dict):
            text[key] = {}
        text = text[key]
    return text  # type: ignore[no-any-return]


def count_of(config: Any) -> int | None:
    """How many blocks a decoder's configuration object says there are."""
    said = (getattr(config, name, None) for name in counted_by(config.model_type))
    return next((number for number in said if isinstance(number, int)), None)


def config_object(config: dict[str, Any]) -> Any | None:
    """What transformers makes of a configuration; None for a type that it does not know.

    Raises:
        ArchitectureError: it is no valid configuration of its type.
    """
    from transformers import CONFIG_MAPPING

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return None
    plain = {k: v for k, v in config.items() if k != "quantization_config"}
    try:
        with quiet_transformers():
            return CONFIG_MAPPING[model_type].from_dict(_decoded(plain))
    except Exception as error:
        raise ArchitectureError(
            f"the configuration is not a valid {model_type} configuration: {one_line(error)}"
        ) from error


def _places(config: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    yield ()
    yield from ((key,) for key, value in config.items() if isinstance(value, dict))


def _is_read(config: dict[str, Any], place: tuple[str, ...]) -> bool:
    """Whether the decoder's vocabulary is that of the part of a configuration at ``place``."""
    changed = copy.deepcopy(config)
    part = changed[place[0]] if place else changed
    size = part.get("vocab_size")
    if not isinstance(size, int):
        return False
    part["vocab_size"] = size + 1
    text = config_object(changed).get_text_config(decoder=True)  # type: ignore[union-attr]
    return bool(getattr(text, "vocab_size", None) == size + 1)


def _decoded(value: Any) -> Any:
    """A copy with the tags resolved that transformers writes for infinite numbers."""
    if isinstance(value, dict):
        if set(value) == {"__float__"}:
            return float(value["__float__"])
        return {k: _decoded(v) for k, v in value.items()}
    return [_decoded(v) for v in value] if isinstance(value, list) else value


def path_of(config: Any, wanted: Any) -> tuple[str, ...]:
    """The keys that lead from a configuration object to one inside it."""
    if config is wanted:
        return ()
    for key, value in vars(config).items():
        if value is wanted:
            return (key,)
        if hasattr(value, "get_text_config"):
            deeper = path_of(value, wanted)
            if deeper:
                return (key, *deeper)
    return ()
