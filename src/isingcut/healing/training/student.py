"""The model that is trained."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from isingcut.options.healing import HealConfig


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """peft asks models by an older name whether they recompute activations: a warning a layer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def load_student(folder: Path, config: HealConfig) -> Any:
    """A model with float32 weights, on the CPU: the Trainer places it."""
    from isingcut.models.cutting.verify import reload

    return reload(folder, dtype=torch.float32, trust_remote_code=config.trust_remote_code)
