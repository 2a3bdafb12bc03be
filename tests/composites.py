"""Tiny random multimodal models, and the flat form of their configurations that hubs hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoModelForImageTextToText

from isingcut.testing.tiny import random_model, tiny_tokenizer
from sweep.shrink import tiny_configuration


def composite(family: str, factory: Any = AutoModelForImageTextToText, **changes: Any) -> Any:
    """A tiny random float32 model of a multimodal family, or of the part another class builds.

    Args:
        changes: configuration fields to set.
    """
    config = tiny_configuration(family)
    for name, value in changes.items():
        setattr(config, name, value)
    return random_model(factory, config).requires_grad_(False)


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
