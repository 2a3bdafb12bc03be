"""The options of a run and of healing: type, default and help.

The command line, `run.yaml` and Python all use these declarations and these defaults.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Interval as Bounds

from isingcut.errors import InputError
from isingcut.options import parsed
from isingcut.options.declaration import (
    Options,
    Section,
    option,
    options_from,
    read_options,
)

Count = Annotated[int, Bounds(ge=1, le=1_000_000)]
Few = Annotated[int, Bounds(ge=2, le=1_000_000)]
Tokens = Annotated[int, Bounds(ge=1, le=2**20)]
Length = Annotated[int, Bounds(ge=8, le=2**20)]
Seed = Annotated[int, Bounds(ge=0, le=2**32 - 1)]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


LEAST_STATES = 30
"""Fewest random states to judge an energy on; with fewer, the correlation is noise."""
PatchTokens = Annotated[int, Bounds(ge=64, le=2**30)]
TEXT = "wiki=0.75,python=0.25"
"""Prose and code, available without a network. A patch fitted on prose alone makes code worse."""
BATCH_TOKENS = 1024
"""Tokens per micro-batch on a CPU, unless an option sets another number."""


QUICK: dict[str, Any] = {
    "samples": 8,
    "length": 128,
    "rank_samples": 8,
    "report_samples": 16,
    "states": 8,
    "random_states": 0,
    "patch_tokens": 16384,
}
"""Values that `quick` sets for options with their default value."""


@dataclass(frozen=True, init=False)
class RunConfig(Options):
    """The options of one run; every field is also a CLI option and a key of `run.yaml`.

    Examples:
        >>> config = isingcut.RunConfig(model="my-model", remove="3")
        >>> config.replace(keep="0").energy
        'auto'
    """

    model: str = option(
        "",
        "Local Hugging Face folder, hub id, .gguf file, or 'smollm2'.",
        argument=True,
    )
    remove: parsed.Removal = option(
        parsed.Removal(),
        "How many blocks to remove: 6, 4..15 for a curve, or attention=2,mlp=1.",
        metavar="M",
    )
    out: str = option("", "Folder for the run; every stage writes its file there.")

    units: Literal["blocks", "sublayers"] = option(
        "blocks",
        "What to remove. blocks: whole layers (in a hybrid, its blocks). sublayers: the attention "
        "or the MLP of a layer alone; --remove attention=6 saves as much of the cache as 6 blocks "
        "for about half of the loss.",
    )
    calibration: str = option(
        TEXT,
        "Calibration text: a .txt, .jsonl, .json or .csv file (also .gz); - for standard input; a "
        "datasets name; 'web', 'instruct' or 'maths' from the hub; 'wiki'; 'python' (standard "
        "library code); 'manual' (Python's manual); or 'self' (the model writes it). "
        "answers:SOURCE counts only the assistant's tokens of a chat. Mix sources by their share "
        "of tokens: wiki=0.75,python=0.25.",
    )
    samples: Count | None = option(
        None,
        "Samples that --energy is measured on (default: set by --energy).",
    )
    length: Length = option(256, "Tokens per sample.")
    rank_samples: Few = option(16, "Further samples, to rank the candidates on.")
    report_samples: Few = option(32, "Unseen samples, for the reported perplexity.")
    seed: Seed = option(0, "Random seed.")

    energy: str = option(
        "auto",
        "How the Hamiltonian is measured. auto: refined with --remove or --budget, else pairwise.",
    )
    compare_energies: str = option(
        "",
        "Further energies to measure and to compare on the same states, comma-separated.",
    )
    effort: parsed.Effort = option(
        parsed.Effort(),
        "Search limit of refined and auto: passes over the text (150) or a time (20min); default: "
        "0.4 of the cost of a greedy search; most searches take half of that.",
    )
    dtype: Dtype = option(
        "auto", "Dtype of the weights: auto, float32, bfloat16 or float16."
    )
    device: parsed.Device = option(
        "auto",
        "Device: auto, cpu, cuda, cuda:N; several (cuda:0,cuda:1) have a part of the model each.",
    )
    cards_per_process: Count | None = option(
        None,
        "GPUs for each process of torchrun (default: one); without it, as many as hold the model.",
    )
    attention: Literal["auto", "sdpa", "eager"] = option(
        "auto",
        "How measurements compute attention: sdpa, eager, or auto (as transformers chooses).",
    )
    batch_tokens: Tokens | None = option(
        None,
        "Tokens per micro-batch (default: 1,024 on a CPU, as many as fit on a GPU).",
    )
    stream: Literal["auto", "on", "off"] = option(
        "auto",
        "Read the blocks from disk one at a time: on, off, or auto (on if the weights exceed "
        "--memory-limit).",
    )
    memory_limit: parsed.Memory = option(
        parsed.Memory(),
        "Memory for weights and hidden states: 8GB or 50% (default: 80% of the free memory).",
    )
    trust_remote_code: bool = option(
        False, "Allow the model's own Python code to run.", typed=True
    )

    solver: str = option("auto", "Solver of low-energy states.")
    states: Annotated[int, Bounds(ge=1, le=100_000)] = option(
        20, "States kept in the spectrum."
    )
    budget: parsed.Budgets = option(
        parsed.Budgets(),
        "Remove at least this much, comma-separated: params=25%, bytes=1GB, kv=30%, "
        "latency=20%@2k (prefill of 2k tokens, by default 128, without the head). Or speed=15%@512 "
        "(decode 15% faster, measured after 512 tokens). Or let `run` choose a GGUF type and how "
        "many blocks go with it, none if quantising is better: file=90MB (the largest file), "
        "memory=2GB@8k (the same with the cache of 8k tokens), decode=25% (fewer bytes to read per "
        "token, which bound decoding).",
    )
    solve_seconds: Annotated[float, Bounds(gt=0, le=3600 * 24 * 365)] = option(
        60.0, "Time limit of the solver, in seconds."
    )
    keep: parsed.BlockList = option(
        parsed.BlockList(), "Blocks to keep, for example 0,1,29."
    )
    must_remove: parsed.BlockList = option(
        parsed.BlockList(), "Blocks to remove in any case."
    )

    random_states: Annotated[int, Bounds(ge=0, le=100_000)] = option(
        40,
        "Random states to measure on a quarter of the text, which show how well the energy ranks "
        "(at least 30; 0 skips this).",
    )
    choose: Literal["measured", "ground", "tasks"] = option(
        "measured",
        "How the final state is chosen: measured (lowest KL; after a patch among near candidates; "
        "if 40 % of the blocks go, also states of a search over patched states and the best state "
        "of one pass), ground (lowest energy), or tasks (the best on --tasks among a few "
        "candidates of low KL).",
    )
    tasks: str = option(
        "",
        "Benchmarks for both models, comma-separated: lm-evaluation-harness tasks, instructions, "
        "needle, with --data the tasks that isingcut ships, or your own .jsonl files of questions.",
    )
    data: str = option(
        "",
        "Folder with the questions of --tasks (default: the hub).",
    )
    questions: Count | None = option(None, "Most questions per task (default: all).")

    patch: str = option(
        "tuned",
        "linear: fold a least-squares map into the block before each cut, where possible. tuned: "
        "linear, then train the layers next to the cuts for a few steps (not with --heal, which "
        "trains all layers). none: no patch.",
    )
    patch_tokens: PatchTokens = option(
        65536,
        "Tokens to fit the patch on: the samples of --energy first, then further text.",
    )
    patch_share: Annotated[float, Bounds(ge=0, le=1)] = option(
        0.5,
        "Share of --patch-tokens from the default text, if --calibration is of other text only: "
        "it keeps the patch from harming other text (0: your text alone).",
    )
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

    drop_mtp: bool = option(
        False,
        "Leave out the layers for multi-token prediction (MTP); without it they are kept.",
    )

    quick: bool = option(
        False,
        "Take a first look in about a quarter of the time: less text, a shorter search, a smaller "
        "patch. The figures are marked as rough.",
    )

    overwrite: bool = option(False, "Replace an existing output.")

    @property
    def removal(self) -> str:
        """The text of `remove`, or of `budget` if only that is given."""
        return self.remove or self.budget

    @property
    def energies(self) -> list[str]:
        """The names of all energies to measure, the main one first."""
        others = [name.strip() for name in self.compare_energies.split(",")]
        return list(dict.fromkeys([self.energy, *filter(None, others)]))

    def at(self, remove: int | str) -> RunConfig:
        """Return the options of another removal, which replaces a budget without ``remove``."""
        budget = self.budget if self.remove else ""
        return self.replace(remove=remove, budget=budget)

    def __init__(self, **values: Any) -> None:
        if isinstance(heal := values.get("heal"), bool):
            values["heal"] = "all" if heal else ""
        super().__init__(**values)
        for name, value in QUICK.items() if self.quick else ():
            if getattr(self, name) == self.__dataclass_fields__[name].default:
                object.__setattr__(self, name, value)
        if 0 < self.random_states < LEAST_STATES:
            raise InputError(
                f"--random-states must be 0 or at least {LEAST_STATES}, got {self.random_states}"
            )
        if both := {*self.keep.numbers} & {*self.must_remove.numbers}:
            raise InputError(
                f"--keep and --must-remove both name block {min(both)}; remove it from one"
            )

    def validate(self) -> RunConfig:
        """Check that these options fit together, and return them.

        Raises:
            InputError: no model, a missing option that another needs, or options that exclude
                each other.
        """
        if not self.model:
            raise InputError(
                "MODEL is missing; give a folder, a hub id, a .gguf file or 'smollm2'"
            )
        if self.budget.packed and (self.remove or self.must_remove):
            what = "--remove" if self.remove else "--must-remove"
            raise InputError(
                f"--budget {self.budget} chooses the blocks to remove; omit {what}"
            )
        if not self.tasks and (self.choose == "tasks" or self.data or self.questions):
            raise InputError(
                "--choose tasks, --data and --questions need benchmarks; name some with --tasks"
            )
        return self


LENGTH = 1024
"""Default tokens per sample."""


@dataclass(frozen=True, init=False)
class HealConfig(Options):
    """The options of healing a cut model; every field is also an option of `isingcut heal`.

    Examples:
        >>> isingcut.options.config.HealConfig(method="lora:8").lora_rank
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
    samples: Count | None = option(None, "Samples of the training text (default: all).")
    length: Length | None = option(
        None,
        "Tokens per sample (default: 1024; a small --train splits them into pieces).",
    )
    report_samples: Few = option(
        16, "Unseen samples, for the figures before and after."
    )
    seed: Seed = option(0, "Random seed.")

    patch: str | None = option(
        None,
        "linear: fold a least-squares map into the block before each cut. tuned: linear, then "
        "train the layers next to the cuts. none: no patch. (Default: linear unless the "
        "checkpoint is patched already; tuned with --method none.)",
    )
    patch_tokens: PatchTokens = option(65536, "Tokens to fit the patch on.")

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

    batch_tokens: Tokens = option(
        BATCH_TOKENS, "Tokens per micro-batch when measuring."
    )
    dtype: Dtype = option(
        "auto", "Dtype of the weights: auto, float32, bfloat16 or float16."
    )
    device: parsed.Device = option(
        "auto",
        "Device: auto, cpu, cuda, cuda:N; several (cuda:0,cuda:1) have a part of the model each.",
    )
    trust_remote_code: bool = option(
        False, "Allow the models' own Python code to run.", typed=True
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


def heal_config(config: RunConfig) -> HealConfig:
    """Return the healing options of a run, from `healing` and from the run's own options.

    Raises:
        InputError: an option that the run itself sets, or an unknown one.
    """
    values = read_options(HealConfig, config.healing.values, "--healing")
    own: dict[str, Any] = {
        "patch": "none" if config.patch == "none" else None,
        "patch_tokens": config.patch_tokens,
        "train": "" if config.heal == "all" else config.heal,
        "device": config.device,
        "trust_remote_code": config.trust_remote_code,
    }
    others = ("student", "teacher", "out", "overwrite", "other_teacher")
    if taken := sorted({*own, *others} & values.keys()):
        raise InputError(
            f"--healing: the run itself sets {', '.join(taken)}; remove it here"
        )
    base = {"text": config.calibration, "seed": config.seed, "dtype": config.dtype}
    if config.batch_tokens:
        base["batch_tokens"] = config.batch_tokens
    if not config.heal:
        own["method"] = "none"
    return options_from(HealConfig, base | values | own, "--healing")


def distil_config(config: RunConfig) -> HealConfig:
    """Return the healing options for the training that follows the patch.

    Raises:
        InputError: options that exclude each other.
    """
    return heal_config(config).replace(patch="none").validate()
