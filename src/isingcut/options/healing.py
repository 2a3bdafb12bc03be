"""Every option of healing a cut model: its type, default and help."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from isingcut.errors import InputError
from isingcut.options.declaration import Options, option
from isingcut.options.spellings import parse_healing
from isingcut.options.types import (
    BATCH_TOKENS,
    TEXT,
    Bounds,
    Count,
    Device,
    Dtype,
    Few,
    Length,
    Patch,
    PatchTokens,
    Place,
    Seed,
    Size,
    Then,
    Tokens,
    reads,
)
from isingcut.options.yaml_file import load_yaml

LENGTH = 1024
"""Tokens of a sample where no option says another number."""


def _schedule(name: str) -> str:
    from transformers.trainer_utils import SchedulerType

    known = [s.value for s in SchedulerType]
    if name not in known:
        raise ValueError(f"must be one of {', '.join(known)}; got {name!r}")
    return name


def _method(name: str) -> str:
    if name not in ("full", "lora", "none") and not re.fullmatch(r"last:[1-9]\d{0,4}", name):
        raise ValueError(
            f"must be one of full, last:N (the last N blocks, as last:3), lora, none; got {name!r}"
        )
    return name


@dataclass(frozen=True)
class HealConfig(Options):
    """Options of healing a cut model; every field is also an option of `isingcut heal`.

    Examples:
        >>> isingcut.options.healing.HealConfig(steps=50).learning_rate is None
        True
    """

    student: Place = option("", "The cut checkpoint's folder.", argument=True)
    teacher: Place = option("", "The original: folder, hub id, .gguf file or 'smollm2'.")
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
    patch_maps: Literal["reads", "writes"] = option(
        "reads", "What the patched layer's new map acts on: reads or writes."
    )

    method: Annotated[str, Then(_method)] = option(
        "full",
        "full (all weights), last:N (the last N blocks and the head), lora, or none (patch only).",
    )
    learning_rate: Annotated[float, Bounds(gt=0, le=10)] | None = option(
        None, "Highest learning rate (default: 2e-5, with lora 2e-4; more for a small --effort)."
    )
    schedule: Annotated[str, Then(_schedule)] = option(
        "cosine", "How it falls, by transformers' name."
    )
    warmup_steps: Annotated[int, Bounds(ge=0, le=1_000_000)] = option(
        100, "Steps in which it rises; at most a tenth of all steps."
    )
    effort: Annotated[str, reads(parse_healing)] = option(
        "",
        "What the training may take: a time (10min, 2h) or tokens (5Mtokens); default: what "
        "--steps or --epochs say.",
    )
    epochs: Annotated[float, Bounds(gt=0, le=10_000)] | None = option(
        None, "How often the text is read (default: once; with --effort at most four times)."
    )
    top_steps: Count | None = option(
        None,
        "Steps for each candidate of `run --heal-top` (default: all of them have a third of the "
        "budget or of the text).",
    )
    steps: Count | None = option(None, "Stop after so many steps; the schedule ends there.")
    batch: Size | None = option(
        None,
        "Sequences per optimiser step, over all processes (default: 16; fewer for a small "
        "--effort).",
    )
    micro_batch: Size | None = option(
        None, "Sequences computed at a time by one process (default: as memory allows)."
    )
    temperature: Annotated[float, Bounds(gt=0, le=1000)] = option(
        1.0, "Both distributions are softened by it."
    )
    hidden_weight: Annotated[float, Bounds(ge=0, le=1_000_000)] = option(
        0.0, "Weight of matching the hidden states behind each cut (0: none)."
    )
    top_k: Annotated[int, Bounds(ge=0, le=2**20)] = option(
        0, "Keep the teacher's K likeliest tokens and their rest on disk first (0: no)."
    )
    stream_teacher: bool = option(
        False, "Read the original block by block from disk; needs --top-k."
    )
    other_teacher: bool = option(
        False, "Take a teacher that is not the model which the cut's record names."
    )
    lora_rank: Size = option(16, "Rank of the LoRA matrices.")
    lora_alpha: Count = option(32, "Their scale.")
    gradient_checkpointing: bool | None = option(
        None,
        "Recompute activations in the backward pass: less memory, more time (default: where one "
        "sequence needs it).",
    )
    save_steps: Count | None = option(
        None,
        "Steps between states that an interrupted healing resumes at, and that are judged "
        "(default: 50, or fewer in a short training).",
    )
    trainer: Place = option(
        "", "YAML file of further transformers TrainingArguments (fsdp, deepspeed, optim)."
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
    def rate(self) -> float:
        """The highest learning rate; 2e-5 as in the paper, LoRA's default ten times that."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 2e-4 if self.method == "lora" else 2e-5

    @property
    def sequences(self) -> int:
        """Of an optimiser step; 16 where neither an option nor a budget says another number."""
        return self.batch or 16

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
        tokens, seconds = parse_healing(self.effort)
        if self.steps is not None and (tokens or seconds):
            raise InputError("--effort and --steps both say how long to train; give one of them")
        if self.top_k and seconds:
            raise InputError(
                "--top-k keeps the teacher's answers before the training's speed is known; give "
                "--effort in tokens"
            )
        if self.top_k and self.temperature != 1:
            raise InputError("--top-k keeps the teacher at temperature 1; give one of them only")
        if self.stream_teacher and not self.top_k:
            raise InputError("--stream-teacher needs --top-k, which keeps the teacher's answers")
        if self.top_k and self.hidden_weight:
            raise InputError("--top-k keeps no hidden states; give one of it and --hidden-weight")
        if self.trainer:
            load_yaml(Path(self.trainer))
        return self
