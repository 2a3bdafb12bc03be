"""Model types whose tiny configuration needs a hand beside the rules of `shrink`."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING

from isingcut.testing.architectures.shrink import tiny_values

# Model type -> arguments that replace or join those derived; dictionaries join recursively,
# and None takes an argument away.
HANDS: dict[str, dict[str, Any]] = {}


def tiny_configuration(model_type: str) -> Any:
    """The configuration of a tiny model of any model type of transformers.

    Raises:
        Exception: whatever its class raises where the derived arguments are none for it.
    """
    cls = CONFIG_MAPPING[model_type]
    values = tiny_values(cls)
    _join(values, HANDS.get(model_type, {}))
    return cls(**values)


def _join(values: dict[str, Any], hand: dict[str, Any]) -> None:
    for name, value in hand.items():
        if value is None:
            values.pop(name, None)
        elif isinstance(value, dict) and isinstance(values.get(name), dict):
            _join(values[name], value)
        else:
            values[name] = value
