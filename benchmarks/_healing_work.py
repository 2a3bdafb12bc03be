"""The work folder of the healing benchmark: settings, finished parts, the model and the texts."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from _coder_model import coder_file
from _healing_texts import Remembered, judged_texts, mixed_text
from isingcut.console.progress import silent, terminal
from isingcut.data.healing_text import HealingText
from isingcut.data.tokens import TokenSet
from isingcut.files import documents
from isingcut.files.writing import read_json, write_json
from isingcut.models import load as models
from isingcut.models.replay import reuse_freed_memory
from isingcut.models.sources import resolve

KIND = "healing-part"
# The benchmark's own files, which no run has: their keys are checked where they are used.
documents.KINDS.update({KIND: documents.Strict, "healing-settings": documents.Strict})


@dataclass(frozen=True)
class Part:
    """One file of the work folder.

    Attributes:
        name: its path without the suffix.
        make: computes the content.
        tokens: its cost, in tokens passed forward through the whole original model.
    """

    name: str
    make: Callable[[], dict[str, Any]]
    tokens: float


def key(removed: list[int]) -> str:
    """A state as part of a file name."""
    return "-".join(map(str, removed))


class WorkFolder:
    """The model, the texts and what is finished.

    Args:
        options: the command line's.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.work, self.data = Path(options.work), Path(options.data)
        names = (
            *("model", "length", "method", "steps", "batch", "rate", "top_steps", "top_tokens"),
            *("peers", "patch_tokens", "judged_tokens", "questions", "dtype", "seed"),
        )
        settings = {k: getattr(options, k) for k in names}
        path = self.work / "settings.json"
        if not path.exists():
            write_json(path, "healing-settings", settings)
        elif {k: read_json(path, "healing-settings")[k] for k in settings} != settings:
            raise SystemExit(f"{path} holds other settings; choose another --work")
        self.progress = silent if options.quiet else terminal

    def path(self, name: str) -> Path:
        """The file of a part."""
        return self.work / "parts" / f"{name}.json"

    def done(self, name: str) -> bool:
        """Whether a part is finished."""
        return self.path(name).exists()

    def read(self, name: str) -> dict[str, Any]:
        """The content of a finished part."""
        return read_json(self.path(name), KIND)

    def run(self, part: Part) -> float:
        """Make a part; seconds taken."""
        began = time.perf_counter()
        content = part.make()
        seconds = time.perf_counter() - began
        write_json(self.path(part.name), KIND, {"seconds": round(seconds, 1), **content})
        return seconds

    # the model and the texts --------------------------------------------------------------

    @cached_property
    def original(self) -> models.LoadedModel:
        o = self.options
        return models.load(
            resolve(str(coder_file()) if o.model == "coder" else o.model), dtype=o.dtype
        )

    @cached_property
    def remembered(self) -> Any:
        return Remembered(self.original.model)

    @cached_property
    def speed(self) -> float:
        """Seconds a token takes through the original, fastest of three batches."""
        reuse_freed_memory()
        ids = torch.randint(8, 200, (4, self.options.length))
        taken = []
        with torch.inference_mode():
            for _ in range(3):
                began = time.perf_counter()
                self.original.model(ids, use_cache=False)
                taken.append(time.perf_counter() - began)
        return min(taken) / ids.numel()

    @cached_property
    def text(self) -> HealingText:
        o = self.options
        patch = -(-o.patch_tokens // o.length)
        return mixed_text(
            self.data,
            self.original.tokenizer,
            self.work / "text",
            samples=max(o.steps * o.batch, patch),
            report_samples=o.top_tokens // o.length,
            length=o.length,
            seed=o.seed,
        )

    @cached_property
    def judged(self) -> dict[str, TokenSet]:
        tokens = self.options.judged_tokens
        return judged_texts(self.data, self.original.tokenizer, tokens, code=True)

    def load(self, folder: Path) -> models.LoadedModel:
        """A checkpoint of the benchmark, computed as the original is."""
        return models.load(folder, dtype=str(self.original.dtype).removeprefix("torch."))

    def folder(self, removed: list[int], stage: str) -> Path:
        """Where the checkpoint of a state at a stage is."""
        if not removed:
            return self.original.folder
        return self.work / "models" / key(removed) / stage
