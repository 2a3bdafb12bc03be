"""Options of healing, in a run and alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from isingcut.errors import InputError
from isingcut.options import parsed
from isingcut.options.declaration import (
    Section,
    option,
    options_from,
    read_options,
)
from isingcut.options.machine import BATCH_TOKENS, MachineOptions, ModelOptions
from isingcut.options.patch import PatchOptions

LENGTH = 1024
"""Default tokens per sample."""


@dataclass(frozen=True, init=False)
class HealConfig(ModelOptions):
    """The options of healing a cut model; every field is also an option of `isingcut heal`.

    Examples:
        >>> isingcut.options.heal.HealConfig(method="lora:8").lora_rank
        8
    """

    student: str = option(
        "", "A run folder, or the folder of a cut checkpoint.", argument=True
    )
    teacher: str = option(
        "",
        "The original model: folder, hub id, .gguf file or 'smollm2' (default: the model named "
        "in the checkpoint's isingcut.json).",
    )
    out: str = option("", "Folder for the healed checkpoint.")
    text: str = option(
        "",
        "Training text: every source of --calibration but 'self' (default: that of the run; "
        "outside a run wiki=0.75,python=0.25).",
    )
    samples: parsed.Count | None = option(
        None, "Samples of the training text (default: all)."
    )
    length: parsed.Length | None = option(
        None,
        "Tokens per sample (default: 1024; a small --train splits them into pieces).",
    )
    report_samples: parsed.Few = option(
        16, "Unseen samples, for the figures before and after."
    )
    seed: parsed.Seed = option(0, "Random seed.")

    patch: str | None = option(
        None,
        "linear: fold a least-squares map into the block before each cut. tuned: linear, then "
        "train the layers next to the cuts. none: no patch. (Default: linear unless the "
        "checkpoint is patched already; tuned with --method none.)",
    )
    patch_tokens: parsed.PatchTokens = option(65536, "Tokens to fit the patch on.")

    method: parsed.Method = option(
        parsed.Method("full"),
        "What to train: full (all weights), lora (rank 16) or lora:RANK, none (patch only).",
    )
    train: parsed.Training | None = option(
        None,
        "How long to train: a time (30m, 2h), tokens (10M tokens), or all: one epoch, which may "
        "take hours (default: 10min, unless --trainer sets steps or epochs).",
    )
    trainer: Section = option(
        Section(),
        "transformers' TrainingArguments (learning_rate, max_steps, optim, fsdp, deepspeed), a "
        "section of --config.",
    )
    other_teacher: bool = option(
        False,
        "Allow a --teacher that is not the model named in the checkpoint's isingcut.json.",
    )

    batch_tokens: parsed.Tokens = option(
        BATCH_TOKENS, "Tokens per micro-batch when measuring."
    )
    overwrite: bool = option(False, "Replace an existing output.")

    @property
    def training(self) -> parsed.Training:
        """The length of the training; before `validate`, one epoch if none is given."""
        return self.train or parsed.Training()

    @property
    def lora_rank(self) -> int:
        """The rank of the LoRA matrices; 0 for other methods."""
        return int(self.method[5:] or 16) if self.method.startswith("lora") else 0

    @property
    def repair(self) -> str:
        """The name of the repair; by default layers are tuned only without a training."""
        return self.patch or ("tuned" if self.method == "none" else "linear")

    def validate(self) -> HealConfig:
        """Check that these options fit together, and return them.

        Raises:
            InputError: options that exclude each other.
        """
        if self.method == "none" and self.patch == "none":
            raise InputError(
                "--method none and --patch none leave nothing to do; change one"
            )
        if self.train is None:
            counted = {"max_steps", "num_train_epochs"} & self.trainer.values.keys()
            return self.replace(train="all" if counted else "10min")
        limited = self.train.tokens or self.train.seconds
        if limited and "max_steps" in self.trainer.values:
            raise InputError(
                "--train and max_steps in --trainer both set how long to train; remove one"
            )
        return self


@dataclass(frozen=True, init=False)
class HealingOptions(PatchOptions, MachineOptions):
    """The training that follows the patch of a run."""

    heal: parsed.Training = option(
        parsed.Training(),
        "Then distil the original into the cut model: for a time (10min), a number of tokens "
        "(5Mtokens), or over the whole text (all; the same as --heal alone).",
        metavar="BUDGET",
    )
    healing: Section = option(
        Section(),
        "Options of `isingcut heal` (text, method, trainer, ...), a section of --config.",
    )

    def training(self) -> HealConfig:
        """Return the options of the training that follows the patch.

        Raises:
            InputError: an option of `healing` that the run itself sets, an unknown one, or options
                that exclude each other.
        """
        values = read_options(HealConfig, self.healing.values, "--healing")
        own: dict[str, Any] = {
            "patch": "none",
            "patch_tokens": self.patch_tokens,
            "train": "" if self.heal == "all" else self.heal,
            "device": self.device,
            "trust_remote_code": self.trust_remote_code,
        }
        others = ("student", "teacher", "out", "overwrite", "other_teacher")
        if taken := sorted({*own, *others} & values.keys()):
            raise InputError(
                f"--healing: the run itself sets {', '.join(taken)}; remove it here"
            )
        base = {"text": self.calibration, "seed": self.seed, "dtype": self.dtype}
        if self.batch_tokens:
            base["batch_tokens"] = self.batch_tokens
        return options_from(HealConfig, base | values | own, "--healing").validate()
