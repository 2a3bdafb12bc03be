"""Every option of a run: its type, default, help and the first stage it touches.

The command line, `run.yaml` and Python take what is declared here; an option has no other
default.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Interval as Bounds

from isingcut.errors import InputError
from isingcut.files.inputs import user_path
from isingcut.options import spellings
from isingcut.options.declaration import Options, Then, from_yaml, load_yaml, option, options_from


def _at_home(text: str) -> str:
    return str(user_path(text)) if text.startswith("~") else text


Count = Annotated[int, Bounds(ge=1, le=1_000_000)]
Few = Annotated[int, Bounds(ge=2, le=1_000_000)]
Tokens = Annotated[int, Bounds(ge=1, le=2**20)]
Length = Annotated[int, Bounds(ge=8, le=2**20)]
Seed = Annotated[int, Bounds(ge=0, le=2**32 - 1)]
Place = Annotated[str, Then(_at_home)]
"""A path, or something else that never begins with ``~``."""
Dtype = Literal["auto", "float32", "bfloat16"]
Patch = Literal["none", "linear", "tuned"]


def _enough(number: int) -> int:
    if 0 < number < LEAST_STATES:
        raise ValueError(f"must be 0 or at least {LEAST_STATES}, got {number}")
    return number


LEAST_STATES = 30
"""Random states that judge an energy; of fewer a correlation says little."""
RandomStates = Annotated[int, Bounds(ge=0, le=100_000), Then(_enough)]
PatchTokens = Annotated[int, Bounds(ge=64, le=2**30)]
TEXT = "wiki=0.75,python=0.25"
"""Prose and code, without a network: a patch fitted on prose alone makes code worse."""
BATCH_TOKENS = 1024
"""Tokens computed at a time where neither an option nor a timing says another number."""


QUICK: dict[str, Any] = {
    "samples": 8,
    "length": 128,
    "rank_samples": 8,
    "report_samples": 16,
    "effort": "15",
    "states": 8,
    "random_states": 0,
    "patch_tokens": 8192,
    "skip_speed": True,
}
"""What `quick` replaces where an option is left at its default."""


@dataclass(frozen=True)
class RunConfig(Options):
    """Options of one run; every field is also a CLI option and a key of `run.yaml`.

    Examples:
        >>> config = isingcut.RunConfig(model="my-model", remove="3")
        >>> config.replace(keep="0").energy
        'auto'
    """

    model: Place = option(
        "", "Local Hugging Face folder, hub id, .gguf file, or 'smollm2'.", "model", argument=True
    )
    remove: spellings.Removal = option(
        spellings.Removal(),
        "How many blocks to remove: 6, 4..15 for a curve, or attention=2,mlp=1.",
        "solve",
        metavar="M",
    )
    out: Place = option("", "Folder for the run; every stage writes its file there.", "report")

    calibration: Place = option(
        TEXT,
        "Text to measure on: a .txt, .jsonl, .json or .csv file (also as .gz), - for standard "
        "input, a datasets name, 'web', 'instruct' or 'maths' (of the hub), 'wiki', 'python' (its "
        "library's code), 'manual' (its reference) or 'self'; answers:SOURCE counts only the "
        "assistant's part of a chat; or a mixture by shares of tokens.",
        "calibration",
    )
    samples: Count | None = option(
        None, "Samples that build --energy (default: the energy's own number).", "calibration"
    )
    length: Length = option(256, "Tokens per sample.", "calibration")
    rank_samples: Few = option(16, "Other samples, that rank the candidates.", "calibration")
    report_samples: Few = option(32, "Other samples, for the reported perplexity.", "calibration")
    seed: Seed = option(0, "Seed of every random choice.", "calibration")

    energy: str = option(
        "auto",
        "How the Hamiltonian is measured; auto: refined near --remove or --budget, pairwise "
        "without.",
        "energy",
        room="energies",
    )
    also: str = option(
        "",
        "Other energies to measure and judge on the same states, for comparison.",
        "energy",
        room="energies",
    )
    effort: spellings.Effort = option(
        spellings.Effort(),
        "What refined and auto may spend: passes over the text (150) or a time (20min); "
        "default: a greedy path's price.",
        "energy",
    )
    linear: bool = option(
        False, "empirical-fisher only: add the gradient term the paper leaves out.", "energy"
    )
    dtype: Dtype = option("auto", "auto, float32 or bfloat16.", "energy")
    device: spellings.Device = option("auto", "auto, cpu, cuda or cuda:N.", "energy")
    attention: Literal["auto", "sdpa", "eager"] = option(
        "auto",
        "How measurements compute attention: sdpa, eager, or auto (as transformers chooses).",
        "energy",
    )
    batch_tokens: Tokens | None = option(
        None,
        "Tokens computed at a time (default: timed, and kept for the run).",
        "energy",
    )
    stream: Literal["auto", "on", "off"] = option(
        "auto",
        "Read the blocks from disk one after the other: on, off, or auto (where the weights do "
        "not fit the memory allowed).",
        "energy",
    )
    memory_limit: spellings.Memory = option(
        spellings.Memory(),
        "Memory for the weights and hidden states, as 8GB or 50% (default: 80% of what is free).",
        "energy",
    )
    trust_remote_code: bool = option(
        False, "Allow the model's own Python code to run.", "model", typed=True
    )

    solver: str = option("auto", "How low-energy states are found.", "solve", room="ising.solvers")
    states: Annotated[int, Bounds(ge=1, le=100_000)] = option(
        20, "States kept in the spectrum.", "solve"
    )
    budget: spellings.Budgets = option(
        spellings.Budgets(),
        "Remove at least this much: params=25%, bytes=1GB, kv=30%, latency=20% (comma-separated).",
        "solve",
    )
    diverse: Annotated[int, Bounds(ge=0, le=spellings.LAST_BLOCK)] = option(
        0, "Candidates at least this many swaps apart (0: any).", "solve"
    )
    solve_seconds: Annotated[float, Bounds(ge=0, le=3600 * 24 * 365)] = option(
        60.0, "Time allowed for the solver.", "solve"
    )
    keep: spellings.BlockList = option(
        spellings.BlockList(), "Blocks that must stay, for example 0,1,29.", "solve"
    )
    drop: spellings.BlockList = option(spellings.BlockList(), "Blocks that must go.", "solve")

    random_states: RandomStates = option(
        40,
        "Random states measured too, on a quarter of the text, to judge the energy (at least 30, "
        "or 0: it is then not judged).",
        "rank",
    )
    choose: Literal["measured", "ground", "tasks"] = option(
        "measured",
        "measured (lowest KL of the candidates), ground, or tasks (of a few unlike ones of low "
        "KL the best on questions of --tasks).",
        "rank",
    )
    tasks: str = option(
        "",
        "Benchmarks to score both models on in the end, comma-separated: tasks of "
        "lm-evaluation-harness, with --data our own, or your own .jsonl files of questions.",
        "rank",
    )
    data: Place = option("", "Folder with the questions of --tasks; without it, the hub's.", "rank")
    questions: Count | None = option(None, "At most so many questions of each task.", "rank")

    patch: Patch = option(
        "tuned",
        "linear: fold a least-squares map into the block before each cut where it can take one; "
        "tuned: then tune the layers beside the cuts for a few steps (not before --heal, which "
        "trains all); or none.",
    )
    patch_tokens: PatchTokens = option(
        32768, "Tokens that the patch is fitted on: those that built --energy, then further ones."
    )
    heal: spellings.Training = option(
        spellings.Training(),
        "Then distil the original into the cut model, for a time (10min), for so many tokens "
        "(5Mtokens), or over all of its text (all; --heal alone means that).",
        metavar="BUDGET",
        bare="all",
    )
    heal_options: Place = option(
        "", "YAML file with options of `isingcut heal` (text, steps, method, ...)."
    )

    skip_speed: bool = option(
        False,
        "Leave out speed and memory, the longest part for a small model; `evaluate` can add them.",
        "evaluate",
    )

    quick: bool = option(
        False,
        "A first look in about a tenth of the time: less text, a shorter search, a smaller patch, "
        "no speed; the figures are marked as rough.",
        "report",
    )

    overwrite: bool = option(False, "Replace an existing output.", "report")

    @property
    def removal(self) -> str:
        """What is removed, in one word: `remove`, or the budget where only that is given."""
        return self.remove or self.budget

    if TYPE_CHECKING:

        def __init__(self, **options: Any) -> None:
            """Texts, numbers and lists are read into the fields' types."""

    def __post_init__(self) -> None:
        # Yes or no in Python and YAML, and in run folders from before there were budgets.
        heal: Any = self.heal
        if isinstance(heal, bool):
            object.__setattr__(self, "heal", "all" if heal else "")
        for name, value in QUICK.items() if self.quick else ():
            own = name != "effort" or self.energy in ("auto", "refined")
            if own and getattr(self, name) == self.__dataclass_fields__[name].default:
                object.__setattr__(self, name, value)
        super().__post_init__()
        if both := {*self.keep.numbers} & {*self.drop.numbers}:
            raise InputError(
                f"--keep and --drop both name block {min(both)}; name it in one of them"
            )

    def validate(self) -> RunConfig:
        """These options, if they go together as a whole.

        Raises:
            InputError: no model, or an option without the one that it needs.
        """
        if not self.model:
            raise InputError(
                "no model was given; expected a folder, a hub id, a .gguf or 'smollm2'"
            )
        if not self.tasks and (self.choose == "tasks" or self.data or self.questions):
            raise InputError("--tasks names no benchmark to ask questions of; name some")
        return self


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
        >>> isingcut.options.config.HealConfig(method="lora:8").lora_rank
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
    effort: spellings.Training = option(
        spellings.Training(),
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
    device: spellings.Device = option("auto", "auto, cpu, cuda or cuda:N.")
    trust_remote_code: bool = option(False, "Allow the models' own Python code to run.", typed=True)
    overwrite: bool = option(False, "Replace an existing output.")

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
        if "max_steps" in settings and (self.effort.tokens or self.effort.seconds):
            raise InputError(
                f"--effort and max_steps in {self.trainer} both say how long to train; give one of "
                "them"
            )
        return self


def heal_config(config: RunConfig) -> HealConfig:
    """Healing options of a run: those of `heal_options`, and what the run itself says.

    Raises:
        InputError: an option that the run sets, or one that does not exist.
    """
    values = from_yaml(HealConfig, user_path(config.heal_options)) if config.heal_options else {}
    set_by_run = {"student", "teacher", "out", "device", "trust_remote_code", "overwrite"}
    set_by_run |= {"other_teacher", "patch", "patch_tokens", "effort"}
    taken = sorted(set_by_run & values.keys())
    if taken:
        raise InputError(
            f"{config.heal_options}: {', '.join(taken)} is set by the run itself; leave it out"
        )
    base = {
        "text": config.calibration,
        "seed": config.seed,
        "dtype": config.dtype,
        **({"batch_tokens": config.batch_tokens} if config.batch_tokens else {}),
    }
    found = options_from(HealConfig, {**base, **values}, config.heal_options or "healing")
    return found.replace(
        patch="none" if config.patch == "none" else None,
        patch_tokens=config.patch_tokens,
        method=found.method if config.heal else "none",
        effort="" if config.heal == "all" else config.heal,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
    )


def patch_config(config: RunConfig) -> HealConfig:
    """The same for the patch of the checkpoint that is cut, which `--heal` trains on from."""
    return heal_config(config).replace(patch="linear" if config.heal else config.patch)


def distil_config(config: RunConfig) -> HealConfig:
    """The same for what follows the patch of the checkpoint that was cut.

    Raises:
        InputError: options that exclude each other.
    """
    return heal_config(config).replace(patch="none").validate()
