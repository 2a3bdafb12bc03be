"""The smallest card that a healing fits: a Llama of 32 narrow blocks on a fake GPU with a budget.

Rank 1 beside a width of 256 is rank 16 beside 4,096: adapters are as small a part of the weights.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from cards import fake_cards
from isingcut.errors import InputError, MemoryExhaustedError
from isingcut.healing.heal import heal
from isingcut.models.cutting.checkpoint import excise
from isingcut.models.device import weight_bytes
from isingcut.options.config import HealConfig
from isingcut.options.declaration import options_from
from isingcut.testing.tiny import tiny_model, tiny_tokenizer

BLOCKS, REMOVED = 32, tuple(range(12, 20))
_WORDS = ["cold", "river", "ran", "below", "stone", "bridge", "while", "old", "farmers", "spoke"]


def write_models(folder: Path, blocks: int = BLOCKS, removed: tuple[int, ...] = REMOVED) -> Path:
    """`original` in bfloat16, `cut` without some blocks, and `text.jsonl`."""
    if (folder / "text.jsonl").exists():
        return folder
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": blocks}
    model: Any = tiny_model("llama", **sizes).bfloat16()
    model.save_pretrained(folder / "original")
    tiny_tokenizer().save_pretrained(folder / "original")
    record = json.dumps({"removed": removed, "of": blocks})
    excise(folder / "original", removed, folder / "cut")
    (folder / "cut" / "isingcut.json").write_text(record)
    lines = [json.dumps({"text": f"{' '.join(_WORDS[i % 10 :])} {i}"}) for i in range(12)]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def original_bytes(folder: Path) -> int:
    """Of the original's weights, in bfloat16."""
    return weight_bytes(folder / "original", torch.bfloat16)


def heal_on_card(folder: Path, budget: int | None, **changes: Any) -> int:
    """Heal on a card of so many bytes, on few tokens in two micro-batches; the peak of bytes."""
    settings = {"max_steps": 2, "save_steps": 2}
    settings |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    given = {
        "student": str(folder / "cut"),
        "teacher": str(folder / "original"),
        "text": str(folder / "text.jsonl"),
        "out": str(folder / "healed"),
        "length": 8,
        "report_samples": 2,
        "samples": 4,
        "trainer": settings,
        "patch": "none",
        "dtype": "bfloat16",
        "device": "lazy:0",
        **changes,
    }
    with (
        fake_cards(budget=budget) as (card,),
        # What a process imports is not on its card.
        mock.patch("isingcut.models.streaming.replay._SLACK", 0),
    ):
        try:
            heal(options_from(HealConfig, given, "card"))
        finally:
            for name in ("healed", ".healed.healing"):
                shutil.rmtree(folder / name, ignore_errors=True)
        return card.peak


def smallest(folder: Path, low: float, high: float, near: float, **changes: Any) -> float:
    """The smallest budget with which a healing completes, to ``near`` of it, by halving.

    Args:
        low, high: one that is too small, and one that is large enough.
    """
    while high - low > near * low:
        middle = (low + high) / 2
        try:
            heal_on_card(folder, int(middle), **changes)
            high = middle
        except (InputError, MemoryExhaustedError):
            low = middle
    return high


def lora_budget(folder: Path) -> float:
    """The smallest card for LoRA beside its teacher, in weights of the original."""
    weights = original_bytes(write_models(folder))
    return smallest(folder, weights, 2 * weights, 0.04, method="lora:1") / weights


def full_budget(folder: Path) -> float:
    """The smallest card for all weights, in bytes that the refusal on a smaller one speaks of."""
    said = ""
    try:
        heal_on_card(write_models(folder), 4 * original_bytes(folder), method="full")
    except InputError as refusal:
        said = str(refusal)
    takes = 1e9 * float(re.findall(r"takes (\S+) GB", said)[0])
    return smallest(folder, 0.8 * takes, 1.25 * takes, 0.02, method="full") / takes
