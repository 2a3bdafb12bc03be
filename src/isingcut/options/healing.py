"""Every option of healing a cut model: its type, default and help."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from isingcut.errors import InputError
from isingcut.options.declaration import Options, option
from isingcut.options.spellings import parse_healing
from isingcut.options.types import (
    BATCH_TOKENS,
    TEXT,
    Count,
    Device,
    Dtype,
    Few,
    Length,
    Patch,
    PatchTokens,
    Place,
    Seed,
    Then,
    Tokens,
    reads,
)
from isingcut.options.yaml_file import load_yaml

LENGTH = 1024
"""Tokens of a sample where no option says another number."""
_NUMBERED = re.compile(r"(last|lora):([1-9]\d{0,4})")


def _method(name: str) -> str:
    if name not in ("full", "lora", "none") and not _NUMBERED.fullmatch(name):
        raise ValueError(
            "must be one of full, last:N (the last N blocks, as last:3), lora or lora:RANK, none; "
            f"got {name!r}"
        )
    return name


@dataclass(frozen=True)
class HealConfig(Options):
    """Options of healing a cut model; every field is also an option of `isingcut heal`.

    Examples:
        >>> isingcut.options.healing.HealConfig(method="lora:8").lora_rank
        8
    """

    student: Place = option("", "The cut checkpoint's folder.", argument=True)
    teacher: Place = option(
        "",
        "The original: folder, hub id, .gguf file or 'smollm2' (default: the one that the "
        "checkpoint's record names).",
    )
    out: Place = option("", "Folder for the healed checkpoint.")
    text: Place = option(
        TEXT,
        "Text to heal with: whatever --calibration takes, but 'self'.",
    )
    samples: Count | None = option(None, "Samples of that text (default: all).")
    length: Length | None = option(
        None, "Tokens per sample (default: 1024; a small --effort trains on pieces of that)."
    )
    report_samples: Few = option(16, "Other samples, for the figures before and after.")
    seed: Seed = option(0, "Seed of every random choice.")

    patch: Patch | None = option(
        None,
        "linear: fold a least-squares map into the block before each cut; tuned: then tune the "
        "layers beside the cuts; or none (default: linear where it can be, once; with --method "
        "none tuned).",
    )
    patch_tokens: PatchTokens = option(65536, "Tokens of the text that the patch is fitted on.")

    method: Annotated[str, Then(_method)] = option(
        "full",
        "full (all weights), last:N (the last N blocks and the head), lora (of rank 16) or "
        "lora:RANK, or none (patch only).",
    )
    effort: Annotated[str, reads(parse_healing)] = option(
        "",
        "How long to train: a time (30m, 2h) or tokens (10M tokens); default: once over the text.",
    )
    trainer: Place = option(
        "",
        "YAML file of transformers' TrainingArguments (learning_rate, max_steps, optim, fsdp, "
        "deepspeed).",
    )
    other_teacher: bool = option(
        False, "Take a teacher that is not the model which the cut's record names."
    )

    batch_tokens: Tokens = option(BATCH_TOKENS, "Tokens computed at a time when measuring.")
    dtype: Dtype = option("auto", "auto, float32 or bfloat16.")
    device: Device = option("auto", "auto, cpu, cuda or cuda:N.", volatile=True)
    trust_remote_code: bool = option(
        False, "Allow the models' own Python code to run.", volatile=True, typed=True
    )
    overwrite: bool = option(False, "Replace an existing output.", volatile=True)

    @property
    def last(self) -> int | None:
        """How many blocks are trained, the last ones; None where all are."""
        return int(self.method[5:]) if self.method.startswith("last:") else None

    @property
    def lora_rank(self) -> int:
        """Rank of the LoRA matrices; 0 for another method."""
        return int(self.method[5:] or 16) if self.method.startswith("lora") else 0

    @property
    def tunes(self) -> bool:
        """Whether a fitted patch is tuned; no use where all that it changes is trained next."""
        return self.patch == "tuned" or (self.patch is None and self.method == "none")

    def validate(self) -> HealConfig:
        """These options, if they go together as a whole.

        Raises:
            InputError: options that exclude each other, or a `trainer` file that cannot be read.
        """
        if self.method == "none" and self.patch == "none":
            raise InputError("--method none without a --patch leaves nothing to do")
        settings = load_yaml(Path(self.trainer)) if self.trainer else {}
        if "max_steps" in settings and any(parse_healing(self.effort)):
            raise InputError(
                f"--effort and max_steps in {self.trainer} both say how long to train; give one of "
                "them"
            )
        return self
