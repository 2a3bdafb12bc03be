"""The model that is trained, and what came out of its training."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from isingcut.models.cutting.verify import reload
from isingcut.options.healing import HealConfig


@contextlib.contextmanager
def _quiet_peft() -> Iterator[None]:
    """peft asks models by an older name whether they recompute activations: a warning a layer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def load_student(folder: Path, config: HealConfig) -> Any:
    """A model with float32 weights, on the CPU: the Trainer places it."""
    return reload(folder, dtype=torch.float32, trust_remote_code=config.trust_remote_code)


def trainable(plain: Any, config: HealConfig) -> Any:
    """The model with what is trained of it: all weights, or small matrices beside them."""
    plain.config.use_cache = False
    if config.method == "full":
        return plain.requires_grad_(True)
    import peft

    settings = peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(config.seed)
    with _quiet_peft():
        return peft.get_peft_model(plain, settings)


def trained_weights(start: Path, trained: Path, config: HealConfig) -> dict[str, torch.Tensor]:
    """The float32 weights that a training left, small matrices merged into their layers.

    Args:
        start: the checkpoint that was trained.
        trained: what the Trainer saved of it.
    """
    model = load_student(trained if config.method == "full" else start, config)
    if config.method == "lora":
        import peft

        with _quiet_peft():
            adapted: Any = peft.PeftModel.from_pretrained(model, trained)
            model = adapted.merge_and_unload()
    found: dict[str, torch.Tensor] = model.state_dict()
    return found
