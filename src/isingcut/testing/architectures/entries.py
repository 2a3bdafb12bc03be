"""Every decoder of transformers: model type x auto class, read from its own mappings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from isingcut.errors import InputError

_MAPPINGS = {
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
}


@dataclass(frozen=True)
class Entry:
    """A model type and an auto class that builds it."""

    model_type: str
    auto_class: str

    @property
    def name(self) -> str:
        """The model type, said to be image-text where images enter beside text."""
        causal = self.auto_class == "AutoModelForCausalLM"
        return self.model_type if causal else f"{self.model_type} (image-text)"

    @property
    def factory(self) -> Any:
        """The auto class itself."""
        import transformers

        return getattr(transformers, self.auto_class)


def entries(model_types: Sequence[str] = ()) -> list[Entry]:
    """All entries of the installed transformers, or those of the named model types.

    Raises:
        InputError: a model type that no mapping has.
    """
    from transformers.models.auto import modeling_auto

    found = [
        Entry(model_type, auto_class)
        for auto_class, mapping in _MAPPINGS.items()
        for model_type in getattr(modeling_auto, mapping)
    ]
    unknown = sorted(set(model_types) - {entry.model_type for entry in found})
    if unknown:
        raise InputError(f"transformers has no causal or image-text model type {unknown[0]!r}")
    return [e for e in found if not model_types or e.model_type in model_types]
