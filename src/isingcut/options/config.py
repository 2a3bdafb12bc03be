"""Every option of a run, with its default, its help and the first stage it touches.

The command line, `run.yaml` and `isingcut.run(...)` are all generated from `RunConfig`, healing
from `HealConfig`: a default that is not here does not exist.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isingcut.errors import InputError
from isingcut.options.declaration import check_all, option, options_from
from isingcut.options.spellings import (
    LAST_BLOCK,
    parse_budgets,
    parse_device,
    parse_effort,
    parse_indices,
    parse_memory,
    parse_removal,
)

STAGES = (
    *("model", "calibration", "energy", "solve", "rank"),
    *("excise", "heal", "evaluate", "report"),
)
"""The stages of a run, in order. An option belongs to the first stage it can change."""


_MANY = 1_000_000
_LONG = 2**20
_STATES = 100_000
_FOREVER = 3600.0 * 24 * 365
_DTYPES = ("auto", "float32", "bfloat16")
PATCHES = ("none", "linear")


def _schedules() -> tuple[str, ...]:
    from transformers.trainer_utils import SchedulerType

    return tuple(s.value for s in SchedulerType)


@dataclass(frozen=True)
class RunConfig:
    """Options of one run; every field is also a CLI option and a key of `run.yaml`.

    Examples:
        >>> config = isingcut.RunConfig(model="my-model", remove="3")
        >>> config.replace(keep="0").energy
        'auto'
    """

    model: str = option(
        "",
        "model",
        "Local Hugging Face folder, hub id, .gguf file, or 'smollm2'.",
        argument=True,
        path=True,
    )
    remove: str = option(
        "",
        "solve",
        "How many blocks to remove: 6, 4..15 for a curve, or attention=2,mlp=1.",
        metavar="M",
        reads=parse_removal,
    )
    out: str = option(
        "", "report", "Folder for the run; every stage writes its file there.", path=True
    )

    calibration: str = option(
        "wiki",
        "calibration",
        "Text to measure on: a .txt, .jsonl, .json or .csv file (also as .gz), - for standard "
        "input, a datasets name, 'wiki' or 'self'.",
        path=True,
    )
    samples: int | None = option(
        None,
        "calibration",
        "Samples that build --energy (default: the energy's own number).",
        low=1,
        high=_MANY,
    )
    length: int = option(256, "calibration", "Tokens per sample.", low=8, high=_LONG)
    rank_samples: int = option(
        16, "calibration", "Other samples, that rank the candidates.", low=2, high=_MANY
    )
    report_samples: int = option(
        32, "calibration", "Other samples, for the reported perplexity.", low=2, high=_MANY
    )
    seed: int = option(0, "calibration", "Seed of every random choice.", low=0, high=2**32 - 1)

    energy: str = option(
        "auto",
        "energy",
        "How the Hamiltonian is measured; auto: refined near --remove or --budget, pairwise "
        "without.",
        room="energies",
    )
    also: str = option(
        "",
        "energy",
        "Other energies to measure and judge on the same states, for comparison.",
        room="energies",
        several=True,
    )
    effort: str = option(
        "",
        "energy",
        "What refined and auto may spend: passes over the text (150) or a time (20min); "
        "default: a greedy path's price.",
        reads=parse_effort,
    )
    linear: bool = option(
        False, "energy", "empirical-fisher only: add the gradient term the paper leaves out."
    )
    dtype: str = option("auto", "energy", "auto, float32 or bfloat16.", choices=_DTYPES)
    device: str = option(
        "auto", "energy", "auto, cpu, cuda or cuda:N.", volatile=True, reads=parse_device
    )
    attention: str = option(
        "auto",
        "energy",
        "How measurements compute attention: sdpa, eager, causal (compiled, for CPUs), or auto "
        "(timed, and kept for the run).",
        volatile=True,
        choices=("auto", "sdpa", "eager", "causal"),
    )
    batch_tokens: int | None = option(
        None,
        "energy",
        "Tokens computed at a time (default: timed, and kept for the run).",
        volatile=True,
        low=1,
        high=_LONG,
    )
    stream: str = option(
        "auto",
        "energy",
        "Read the blocks from disk one after the other: on, off, or auto (where the weights do "
        "not fit the memory allowed).",
        volatile=True,
        choices=("auto", "on", "off"),
    )
    memory_limit: str = option(
        "",
        "energy",
        "Memory for the weights and hidden states, as 8GB or 50% (default: 80% of what is free).",
        volatile=True,
        reads=parse_memory,
    )
    trust_remote_code: bool = option(
        False, "model", "Allow the model's own Python code to run.", volatile=True, typed=True
    )

    solver: str = option("auto", "solve", "How low-energy states are found.", room="ising.solvers")
    states: int = option(20, "solve", "States kept in the spectrum.", low=1, high=_STATES)
    budget: str = option(
        "",
        "solve",
        "Remove at least this much: params=25%, bytes=1GB, kv=30%, latency=20% (comma-separated).",
        reads=parse_budgets,
    )
    diverse: int = option(
        0, "solve", "Candidates at least this many swaps apart (0: any).", low=0, high=LAST_BLOCK
    )
    solve_seconds: float = option(
        60.0, "solve", "Time allowed for the solver.", volatile=True, low=0, high=_FOREVER
    )
    keep: str = option(
        "", "solve", "Blocks that must stay, for example 0,1,29.", reads=parse_indices, apart="drop"
    )
    drop: str = option("", "solve", "Blocks that must go.", reads=parse_indices)

    random_states: int = option(
        40,
        "rank",
        "Random states measured too, to judge the energy (at least 30).",
        low=30,
        high=_STATES,
    )
    choose: str = option(
        "measured",
        "rank",
        "measured (lowest KL of the candidates) or ground.",
        choices=("measured", "ground"),
    )

    patch: str = option(
        "none",
        "heal",
        "linear: fold a least-squares map into the block before each cut; or none.",
        choices=PATCHES,
    )
    heal: bool = option(False, "heal", "Distil the original into the cut model afterwards.")
    heal_top: int = option(
        0,
        "heal",
        "Heal so many of the best candidates for a few steps first, and choose after it.",
        low=0,
        high=1000,
    )
    heal_options: str = option(
        "",
        "heal",
        "YAML file with options of `isingcut heal` (text, steps, method, ...).",
        path=True,
    )

    skip_speed: bool = option(
        False,
        "evaluate",
        "Leave out speed and memory, the longest part for a small model; `evaluate` can add them.",
        volatile=True,
    )

    overwrite: bool = option(False, "report", "Replace an existing output.", volatile=True)

    def replace(self, **changes: Any) -> RunConfig:
        """A copy with some options changed."""
        return dataclasses.replace(self, **changes)

    @property
    def removal(self) -> str:
        """What is removed, in one word: `remove`, or the budget where only that is given."""
        return self.remove or self.budget

    def stage_options(self, last: str) -> dict[str, Any]:
        """The options that can change the result of stage ``last`` or of one before it."""
        reach = STAGES.index(last)
        return {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if STAGES.index(f.metadata["stage"]) <= reach and not f.metadata.get("volatile")
        }

    def validate(self) -> RunConfig:
        """The options in their types, all that can be checked without a model checked.

        Raises:
            InputError: one line that names the option, what was expected and what came.
        """
        config = check_all(self)
        if not config.model:
            raise InputError(
                "no model was given; expected a folder, a hub id, a .gguf or 'smollm2'"
            )
        if config.heal_top and not (config.heal or config.patch != "none"):
            raise InputError("--heal-top compares healed candidates; give --heal or --patch too")
        return config


@dataclass(frozen=True)
class HealConfig:
    """Options of healing a cut model; every field is also an option of `isingcut heal`.

    Examples:
        >>> isingcut.options.config.HealConfig(steps=50).learning_rate is None
        True
    """

    student: str = option("", "heal", "The cut checkpoint's folder.", argument=True, path=True)
    teacher: str = option(
        "", "heal", "The original: folder, hub id, .gguf file or 'smollm2'.", path=True
    )
    out: str = option("", "heal", "Folder for the healed checkpoint.", path=True)
    text: str = option(
        "wiki",
        "heal",
        "Text to heal with: a file or - as for --calibration, a datasets name or 'wiki'.",
        path=True,
    )
    samples: int | None = option(
        None, "heal", "Samples of that text (default: all).", low=1, high=_MANY
    )
    length: int = option(1024, "heal", "Tokens per sample.", low=8, high=_LONG)
    report_samples: int = option(
        16, "heal", "Other samples, for the figures before and after.", low=2, high=_MANY
    )
    seed: int = option(0, "heal", "Seed of every random choice.", low=0, high=2**32 - 1)

    patch: str = option(
        "none",
        "heal",
        "linear: fold a least-squares map into the block before each cut; or none.",
        choices=PATCHES,
    )
    patch_tokens: int = option(
        65536, "heal", "Tokens of the text that the patch is fitted on.", low=64, high=2**30
    )
    patch_maps: str = option(
        "reads",
        "heal",
        "What the patched layer's new map acts on: reads or writes.",
        choices=("reads", "writes"),
    )

    method: str = option(
        "full",
        "heal",
        "full (all weights), lora, or none (patch only).",
        choices=("full", "lora", "none"),
    )
    learning_rate: float | None = option(
        None, "heal", "Highest learning rate (default: 2e-5, with lora 2e-4).", above=0, high=10
    )
    schedule: str = option(
        "cosine", "heal", "How it falls, by transformers' name.", choices=_schedules
    )
    warmup_steps: int = option(
        100, "heal", "Steps in which it rises; at most a tenth of all steps.", low=0, high=_MANY
    )
    epochs: float = option(1.0, "heal", "How often the text is read.", above=0, high=10_000)
    top_steps: int = option(
        20, "heal", "Steps for each candidate of `run --heal-top`.", low=1, high=_MANY
    )
    steps: int | None = option(
        None, "heal", "Stop after so many steps; the schedule ends there.", low=1, high=_MANY
    )
    batch: int = option(
        16, "heal", "Sequences per optimiser step, over all processes.", low=1, high=2**16
    )
    micro_batch: int = option(
        1, "heal", "Sequences computed at a time by one process.", low=1, high=2**16
    )
    temperature: float = option(
        1.0, "heal", "Both distributions are softened by it.", above=0, high=1000
    )
    hidden_weight: float = option(
        0.0,
        "heal",
        "Weight of matching the hidden states behind each cut (0: none).",
        low=0,
        high=_MANY,
    )
    top_k: int = option(
        0,
        "heal",
        "Keep the teacher's K likeliest tokens and their rest on disk first (0: no).",
        low=0,
        high=_LONG,
    )
    stream_teacher: bool = option(
        False, "heal", "Read the original block by block from disk; needs --top-k."
    )
    other_teacher: bool = option(
        False, "heal", "Take a teacher that is not the model which the cut's record names."
    )
    lora_rank: int = option(16, "heal", "Rank of the LoRA matrices.", low=1, high=2**16)
    lora_alpha: int = option(32, "heal", "Their scale.", low=1, high=_MANY)
    gradient_checkpointing: bool = option(
        False, "heal", "Recompute activations in the backward pass: less memory, more time."
    )
    save_steps: int = option(
        50, "heal", "Steps between states an interrupted healing resumes at.", low=1, high=_MANY
    )
    trainer: str = option(
        "",
        "heal",
        "YAML file of further transformers TrainingArguments (fsdp, deepspeed, optim).",
        path=True,
    )

    batch_tokens: int = option(
        1024, "heal", "Tokens computed at a time when measuring.", low=1, high=_LONG
    )
    dtype: str = option("auto", "heal", "auto, float32 or bfloat16.", choices=_DTYPES)
    device: str = option(
        "auto", "heal", "auto, cpu, cuda or cuda:N.", volatile=True, reads=parse_device
    )
    trust_remote_code: bool = option(
        False, "heal", "Allow the models' own Python code to run.", volatile=True, typed=True
    )
    overwrite: bool = option(False, "heal", "Replace an existing output.", volatile=True)

    @property
    def rate(self) -> float:
        """The highest learning rate; 2e-5 as in the paper, LoRA's default ten times that."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 2e-4 if self.method == "lora" else 2e-5

    def replace(self, **changes: Any) -> HealConfig:
        """A copy with some options changed."""
        return dataclasses.replace(self, **changes)

    def validate(self) -> HealConfig:
        """The options in their types, all that can be checked without a model checked.

        Raises:
            InputError: one line that names the option, what was expected and what came.
        """
        config = check_all(self)
        if config.method == "none" and config.patch == "none":
            raise InputError("--method none without a --patch leaves nothing to do")
        if config.top_k and config.temperature != 1:
            raise InputError("--top-k keeps the teacher at temperature 1; give one of them only")
        if config.stream_teacher and (not config.top_k or config.patch != "none"):
            raise InputError(
                "--stream-teacher needs --top-k, and a --patch needs the teacher in memory"
            )
        if config.top_k and config.hidden_weight:
            raise InputError("--top-k keeps no hidden states; give one of it and --hidden-weight")
        if config.trainer:
            from isingcut.options.yaml_file import load_yaml

            load_yaml(Path(config.trainer))
        return config


def from_mapping(values: Mapping[str, Any], source: str) -> RunConfig:
    """A `RunConfig` from options by name (dashes and underscores both work).

    Raises:
        InputError: unknown name (with a suggestion) or a value of the wrong type.
    """
    return options_from(RunConfig, values, source)
