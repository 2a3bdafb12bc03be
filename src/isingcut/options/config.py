"""Every option of a run: its type, default, help and the first stage it touches.

The command line, `run.yaml` and Python take what is declared here (healing: `healing.py`); an
option has no other default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from isingcut.errors import InputError
from isingcut.options.declaration import Options, option
from isingcut.options.spellings import (
    LAST_BLOCK,
    BlockList,
    Budgets,
    Effort,
    Memory,
    Removal,
    parse_healing,
)
from isingcut.options.types import (
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
    RandomStates,
    Seed,
    Tokens,
    reads,
)

STAGES = (
    *("model", "calibration", "energy", "solve", "rank"),
    *("excise", "heal", "evaluate", "report"),
)
"""The stages of a run, in order. An option belongs to the first stage it can change."""


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
    remove: Removal = option(
        Removal(),
        "How many blocks to remove: 6, 4..15 for a curve, or attention=2,mlp=1.",
        "solve",
        metavar="M",
    )
    out: Place = option("", "Folder for the run; every stage writes its file there.", "report")

    calibration: Place = option(
        TEXT,
        "Text to measure on: a .txt, .jsonl, .json or .csv file (also as .gz), - for standard "
        "input, a datasets name, 'web', 'instruct' or 'maths' (of the hub), 'wiki', 'python' (its "
        "library's code) or 'self'; answers:SOURCE counts only the assistant's part of a chat; or "
        "a mixture by shares of tokens.",
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
    effort: Effort = option(
        Effort(),
        "What refined and auto may spend: passes over the text (150) or a time (20min); "
        "default: a greedy path's price.",
        "energy",
    )
    linear: bool = option(
        False, "empirical-fisher only: add the gradient term the paper leaves out.", "energy"
    )
    dtype: Dtype = option("auto", "auto, float32 or bfloat16.", "energy")
    device: Device = option("auto", "auto, cpu, cuda or cuda:N.", "energy", volatile=True)
    attention: Literal["auto", "sdpa", "eager"] = option(
        "auto",
        "How measurements compute attention: sdpa, eager, or auto (as transformers chooses).",
        "energy",
        volatile=True,
    )
    batch_tokens: Tokens | None = option(
        None,
        "Tokens computed at a time (default: timed, and kept for the run).",
        "energy",
        volatile=True,
    )
    stream: Literal["auto", "on", "off"] = option(
        "auto",
        "Read the blocks from disk one after the other: on, off, or auto (where the weights do "
        "not fit the memory allowed).",
        "energy",
        volatile=True,
    )
    memory_limit: Memory = option(
        Memory(),
        "Memory for the weights and hidden states, as 8GB or 50% (default: 80% of what is free).",
        "energy",
        volatile=True,
    )
    trust_remote_code: bool = option(
        False, "Allow the model's own Python code to run.", "model", volatile=True, typed=True
    )

    solver: str = option("auto", "How low-energy states are found.", "solve", room="ising.solvers")
    states: Annotated[int, Bounds(ge=1, le=100_000)] = option(
        20, "States kept in the spectrum.", "solve"
    )
    budget: Budgets = option(
        Budgets(),
        "Remove at least this much: params=25%, bytes=1GB, kv=30%, latency=20% (comma-separated).",
        "solve",
    )
    diverse: Annotated[int, Bounds(ge=0, le=LAST_BLOCK)] = option(
        0, "Candidates at least this many swaps apart (0: any).", "solve"
    )
    solve_seconds: Annotated[float, Bounds(ge=0, le=3600 * 24 * 365)] = option(
        60.0, "Time allowed for the solver.", "solve", volatile=True
    )
    keep: BlockList = option(BlockList(), "Blocks that must stay, for example 0,1,29.", "solve")
    drop: BlockList = option(BlockList(), "Blocks that must go.", "solve")

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
    keep_cut: bool = option(False, "Keep the exact cut too, unpatched, in the folder cut.")
    heal: Annotated[str, reads(parse_healing)] = option(
        "",
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
        volatile=True,
    )

    overwrite: bool = option(False, "Replace an existing output.", "report", volatile=True)

    @property
    def removal(self) -> str:
        """What is removed, in one word: `remove`, or the budget where only that is given."""
        return self.remove or self.budget

    def stage_options(self, last: str) -> dict[str, Any]:
        """The options that can change the result of stage ``last`` or of one before it."""
        reach = STAGES.index(last)
        return {
            name: getattr(self, name)
            for name, f in self.__dataclass_fields__.items()
            if STAGES.index(f.metadata["stage"]) <= reach and not f.metadata["volatile"]
        }

    if TYPE_CHECKING:

        def __init__(self, **options: Any) -> None:
            """Texts, numbers and lists are read into the fields' types."""

    def __post_init__(self) -> None:
        # Yes or no in Python and YAML, and in run folders from before there were budgets.
        heal: Any = self.heal
        if isinstance(heal, bool):
            object.__setattr__(self, "heal", "all" if heal else "")
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
