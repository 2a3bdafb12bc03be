"""Every option of a run, with its default, its help and the first stage it touches.

The command line, `run.yaml` and `isingcut.run(...)` are all generated from `RunConfig`, healing
from `HealConfig`: a default that is not here does not exist.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from isingcut.errors import InputError

STAGES = (
    *("model", "calibration", "energy", "solve", "rank"),
    *("excise", "heal", "evaluate", "report"),
)
"""The stages of a run, in order. An option belongs to the first stage it can change."""


def _option(default: Any, stage: str, help_: str, **extra: Any) -> Any:
    return field(default=default, metadata={"stage": stage, "help": help_, **extra})


@dataclass(frozen=True)
class RunConfig:
    """Options of one run; every field is also a CLI option and a key of `run.yaml`.

    Examples:
        >>> config = isingcut.RunConfig(model="my-model", remove="3")
        >>> config.replace(keep="0").energy
        'auto'
    """

    model: str = _option(
        "", "model", "Local Hugging Face folder, hub id, .gguf file, or 'smollm2'.", argument=True
    )
    remove: str = _option(
        "",
        "solve",
        "How many blocks to remove: 6, 4..15 for a curve, or attention=2,mlp=1.",
        metavar="M",
    )
    out: str = _option("", "report", "Folder for the run; every stage writes its file there.")

    calibration: str = _option(
        "wiki",
        "calibration",
        "Text to measure on: a .txt, .jsonl, .json or .csv file (also as .gz), - for standard "
        "input, a datasets name, 'wiki' or 'self'.",
    )
    samples: int | None = _option(
        None, "calibration", "Samples that build --energy (default: the energy's own number)."
    )
    length: int = _option(256, "calibration", "Tokens per sample.")
    rank_samples: int = _option(16, "calibration", "Other samples, that rank the candidates.")
    report_samples: int = _option(32, "calibration", "Other samples, for the reported perplexity.")
    seed: int = _option(0, "calibration", "Seed of every random choice.")

    energy: str = _option(
        "auto",
        "energy",
        "How the Hamiltonian is measured; auto: refined near --remove or --budget, pairwise "
        "without.",
    )
    also: str = _option(
        "", "energy", "Other energies to measure and judge on the same states, for comparison."
    )
    effort: str = _option(
        "",
        "energy",
        "What refined and auto may spend: passes over the text (150) or a time (20min); "
        "default: a greedy path's price.",
    )
    linear: bool = _option(
        False, "energy", "empirical-fisher only: add the gradient term the paper leaves out."
    )
    dtype: str = _option("auto", "energy", "auto, float32 or bfloat16.")
    device: str = _option("auto", "energy", "auto, cpu, cuda or cuda:N.", volatile=True)
    attention: str = _option(
        "auto",
        "energy",
        "How measurements compute attention: sdpa, eager, causal (compiled, for CPUs), or auto "
        "(timed, and kept for the run).",
        volatile=True,
    )
    batch_tokens: int | None = _option(
        None,
        "energy",
        "Tokens computed at a time (default: timed, and kept for the run).",
        volatile=True,
    )
    stream: str = _option(
        "auto",
        "energy",
        "Read the blocks from disk one after the other: on, off, or auto (where the weights do "
        "not fit the memory allowed).",
        volatile=True,
    )
    memory_limit: str = _option(
        "",
        "energy",
        "Memory for the weights and hidden states, as 8GB or 50% (default: 80% of what is free).",
        volatile=True,
    )
    trust_remote_code: bool = _option(
        False, "model", "Allow the model's own Python code to run.", volatile=True
    )

    solver: str = _option("auto", "solve", "How low-energy states are found.")
    states: int = _option(20, "solve", "States kept in the spectrum.")
    budget: str = _option(
        "",
        "solve",
        "Remove at least this much: params=25%, bytes=1GB, kv=30%, latency=20% (comma-separated).",
    )
    diverse: int = _option(0, "solve", "Candidates at least this many swaps apart (0: any).")
    solve_seconds: float = _option(60.0, "solve", "Time allowed for the solver.", volatile=True)
    keep: str = _option("", "solve", "Blocks that must stay, for example 0,1,29.")
    drop: str = _option("", "solve", "Blocks that must go.")

    random_states: int = _option(
        40, "rank", "Random states measured too, to judge the energy (at least 30)."
    )
    choose: str = _option("measured", "rank", "measured (lowest KL of the candidates) or ground.")

    patch: str = _option(
        "none", "heal", "linear: fold a least-squares map into the block before each cut; or none."
    )
    heal: bool = _option(False, "heal", "Distil the original into the cut model afterwards.")
    heal_top: int = _option(
        0, "heal", "Heal so many of the best candidates for a few steps first, and choose after it."
    )
    heal_options: str = _option(
        "", "heal", "YAML file with options of `isingcut heal` (text, steps, method, ...)."
    )

    overwrite: bool = _option(False, "report", "Replace an existing output.", volatile=True)

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
        """Check what can be checked without a model.

        Raises:
            InputError: one line that names the option, what was expected and what came.
        """
        if not self.model:
            raise InputError(
                "no model was given; expected a folder, a hub id, a .gguf or 'smollm2'"
            )
        for name, lowest in {
            "samples": 1,
            "length": 8,
            "rank_samples": 2,
            "report_samples": 2,
            "batch_tokens": 1,
            "states": 1,
            "random_states": 30,
        }.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                flag = name.replace("_", "-")
                raise InputError(f"--{flag} must be at least {lowest}, got {value}")
        _one_of("--dtype", self.dtype, ("auto", "float32", "bfloat16"))
        _one_of("--stream", self.stream, ("auto", "on", "off"))
        _one_of("--attention", self.attention, ("auto", "sdpa", "eager", "causal"))
        _one_of("--choose", self.choose, ("measured", "ground"))
        _one_of("--patch", self.patch, PATCHES)
        if self.heal_top < 0:
            raise InputError(f"--heal-top must be at least 0, got {self.heal_top}")
        if self.heal_top and not (self.heal or self.patch != "none"):
            raise InputError("--heal-top compares healed candidates; give --heal or --patch too")
        return self


PATCHES = ("none", "linear")


@dataclass(frozen=True)
class HealConfig:
    """Options of healing a cut model; every field is also an option of `isingcut heal`.

    Examples:
        >>> isingcut.config.HealConfig(steps=50).learning_rate is None
        True
    """

    student: str = _option("", "heal", "The cut checkpoint's folder.", argument=True)
    teacher: str = _option("", "heal", "The original: folder, hub id, .gguf file or 'smollm2'.")
    out: str = _option("", "heal", "Folder for the healed checkpoint.")
    text: str = _option(
        "wiki",
        "heal",
        "Text to heal with: a file or - as for --calibration, a datasets name or 'wiki'.",
    )
    samples: int | None = _option(None, "heal", "Samples of that text (default: all).")
    length: int = _option(1024, "heal", "Tokens per sample.")
    report_samples: int = _option(16, "heal", "Other samples, for the figures before and after.")
    seed: int = _option(0, "heal", "Seed of every random choice.")

    patch: str = _option(
        "none", "heal", "linear: fold a least-squares map into the block before each cut; or none."
    )
    patch_tokens: int = _option(65536, "heal", "Tokens of the text that the patch is fitted on.")
    patch_maps: str = _option(
        "reads", "heal", "What the patched layer's new map acts on: reads or writes."
    )

    method: str = _option("full", "heal", "full (all weights), lora, or none (patch only).")
    learning_rate: float | None = _option(
        None, "heal", "Highest learning rate (default: 2e-5, with lora 2e-4)."
    )
    schedule: str = _option("cosine", "heal", "How it falls, by transformers' name.")
    warmup_steps: int = _option(
        100, "heal", "Steps in which it rises; at most a tenth of all steps."
    )
    epochs: float = _option(1.0, "heal", "How often the text is read.")
    top_steps: int = _option(20, "heal", "Steps for each candidate of `run --heal-top`.")
    steps: int | None = _option(None, "heal", "Stop after so many steps; the schedule ends there.")
    batch: int = _option(16, "heal", "Sequences per optimiser step, over all processes.")
    micro_batch: int = _option(1, "heal", "Sequences computed at a time by one process.")
    temperature: float = _option(1.0, "heal", "Both distributions are softened by it.")
    hidden_weight: float = _option(
        0.0, "heal", "Weight of matching the hidden states behind each cut (0: none)."
    )
    top_k: int = _option(
        0, "heal", "Keep the teacher's K likeliest tokens and their rest on disk first (0: no)."
    )
    stream_teacher: bool = _option(
        False, "heal", "Read the original block by block from disk; needs --top-k."
    )
    lora_rank: int = _option(16, "heal", "Rank of the LoRA matrices.")
    lora_alpha: int = _option(32, "heal", "Their scale.")
    gradient_checkpointing: bool = _option(
        False, "heal", "Recompute activations in the backward pass: less memory, more time."
    )
    save_steps: int = _option(50, "heal", "Steps between states an interrupted healing resumes at.")
    trainer: str = _option(
        "", "heal", "YAML file of further transformers TrainingArguments (fsdp, deepspeed, optim)."
    )

    batch_tokens: int = _option(1024, "heal", "Tokens computed at a time when measuring.")
    dtype: str = _option("auto", "heal", "auto, float32 or bfloat16.")
    device: str = _option("auto", "heal", "auto, cpu, cuda or cuda:N.", volatile=True)
    trust_remote_code: bool = _option(
        False, "heal", "Allow the models' own Python code to run.", volatile=True
    )
    overwrite: bool = _option(False, "heal", "Replace an existing output.", volatile=True)

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
        """Check what can be checked without a model.

        Raises:
            InputError: one line that names the option, what was expected and what came.
        """
        for name, lowest in {
            "samples": 1,
            "length": 8,
            "report_samples": 2,
            "patch_tokens": 64,
            "warmup_steps": 0,
            "steps": 1,
            "top_steps": 1,
            "batch": 1,
            "micro_batch": 1,
            "hidden_weight": 0,
            "top_k": 0,
            "lora_rank": 1,
            "save_steps": 1,
            "batch_tokens": 1,
        }.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                flag = name.replace("_", "-")
                raise InputError(f"--{flag} must be at least {lowest}, got {value}")
        for name in ("epochs", "temperature"):
            if getattr(self, name) <= 0:
                raise InputError(f"--{name} must be above 0, got {getattr(self, name)}")
        _one_of("--dtype", self.dtype, ("auto", "float32", "bfloat16"))
        _one_of("--patch", self.patch, PATCHES)
        _one_of("--patch-maps", self.patch_maps, ("reads", "writes"))
        _one_of("--method", self.method, ("full", "lora", "none"))
        if self.method == "none" and self.patch == "none":
            raise InputError("--method none without a --patch leaves nothing to do")
        if self.top_k and self.temperature != 1:
            raise InputError("--top-k keeps the teacher at temperature 1; give one of them only")
        if self.stream_teacher and (not self.top_k or self.patch != "none"):
            raise InputError(
                "--stream-teacher needs --top-k, and a --patch needs the teacher in memory"
            )
        if self.top_k and self.hidden_weight:
            raise InputError("--top-k keeps no hidden states; give one of it and --hidden-weight")
        return self


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{option} must be one of {', '.join(allowed)}; got {value!r}")


def field_names() -> list[str]:
    """All option names."""
    return [f.name for f in dataclasses.fields(RunConfig)]


def from_mapping(values: Mapping[str, Any], source: str) -> RunConfig:
    """A `RunConfig` from keys as `run.yaml` has them (dashes and underscores both work).

    Raises:
        InputError: unknown key (with a suggestion) or a value of the wrong type.
    """
    return options_from(RunConfig, values, source)


Options = TypeVar("Options", RunConfig, HealConfig)


def options_from(kind: type[Options], values: Mapping[str, Any], source: str) -> Options:
    """Options of one kind from a mapping, as `from_mapping`."""
    known = {f.name: f for f in dataclasses.fields(kind)}
    checked: dict[str, Any] = {}
    for raw, value in values.items():
        name = str(raw).replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, list(known), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"{source}: unknown option {raw!r}{hint} known: {', '.join(known)}")
        checked[name] = _coerced(name, str(known[name].type), value, source)
    return kind(**checked)


def _coerced(name: str, declared: str, value: Any, source: str) -> Any:
    """``value`` as the declared type, or an error: never a guess."""
    base = declared.removesuffix(" | None")
    if value is None and base != declared:
        return None
    if base == "bool" and isinstance(value, bool):
        return value
    if base == "int" and isinstance(value, int) and not isinstance(value, bool):
        return value
    if base == "float" and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if base == "str" and isinstance(value, str | int | Path) and not isinstance(value, bool):
        return str(value)
    if base == "str" and isinstance(value, list | tuple):
        return ",".join(str(v) for v in value)
    raise InputError(f"{source}: {name} must be {_words(base)}, got {value!r}")


def _words(base: str) -> str:
    return {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}[
        base
    ]


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML config file.

    Raises:
        InputError: missing, unreadable, or not a mapping.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise InputError(f"no such config file: {path}") from e
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise InputError(f"{path} is not a readable YAML file: {' '.join(str(e).split())}") from e
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold 'option: value' lines, found {type(content).__name__}")
    return content
