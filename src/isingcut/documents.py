"""What each JSON file of a run folder and of a cut checkpoint holds: one pydantic model a kind.

A model names what version 1 always has, with types, sizes and ranges, so that whoever reads a
document may rely on it. What else a file has is let through: older and newer files of the same
version still open. `files.read_json` checks every document here; the headers of the safetensors
files (`tensor_files`) are documents too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from isingcut.errors import StageFileError

MOST_BLOCKS = 4096
"""More blocks than any model has; what is drawn of a run grows with their square."""

_MOST_CELLS = 2**28

# A number whose square and sums are finite too: a report scales, adds and draws them.
Number = Annotated[float, Field(ge=-1e30, le=1e30)]
Positive = Annotated[float, Field(ge=0, le=1e30)]
Count = Annotated[int, Field(ge=0, le=10**18)]
Some = Annotated[int, Field(ge=1, le=10**18)]
Scalar = str | int | float | bool | None


def _distinct(blocks: list[int]) -> list[int]:
    if len(set(blocks)) < len(blocks):
        raise ValueError("a block is named twice")
    return blocks


Index = Annotated[int, Field(ge=0, le=2**31)]
Blocks = Annotated[list[Index], Field(max_length=2**20), AfterValidator(_distinct)]


class Part(BaseModel):
    """An object inside a document: strict types, finite numbers, unknown keys let through."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class Model(Part):
    """The identity of the model that a run is of."""

    name: str
    sha256: str


class Split(Part):
    """The size of one token split."""

    samples: Count
    tokens: Count


class Calibration(Part):
    """The text of a run."""

    source: str
    sha256: str
    splits: dict[str, Split]


class Asked(Part):
    """How measurements were asked to be computed."""

    attention: str
    batch_tokens: Some | None


class Computed(Part):
    """How measurements were computed on one device."""

    asked: Asked
    # Of any other name transformers would fetch code from the hub.
    attention: Literal["sdpa", "eager", "causal"] | None
    batch_tokens: Some
    threads: Annotated[int, Field(ge=1, le=4096)] | None = None


class Places(Part):
    """Where a local model lay when it was read."""

    absolute: str
    relative: str


class Provenance(Part):
    """Where the figures of a run come from."""

    isingcut: str
    python: str
    torch: str
    transformers: str
    platform: str
    cpu: str
    command_line: str
    created: str
    model: Model
    calibration: Calibration | None = None
    computed: dict[str, Computed] = {}
    model_path: Places | None = None
    dtype: str | None = None


class Config(Part):
    """The options of a run; `RunConfig` knows the rest."""

    __pydantic_extra__: dict[str, Scalar]
    model: str
    energy: str
    seed: int
    remove: str = ""
    budget: str = ""


class StageOptions(Part):
    """What a stage was made with, as far as it is read."""

    remove: str | int | None = None
    removed: Blocks | None = None


class Stage(Part):
    """The record of one stage."""

    stage: str
    done: bool
    fingerprint: str
    options: StageOptions
    seconds: Positive | None = None
    sha256: str | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.done and self.seconds is None:
            raise ValueError("a finished stage needs its seconds")
        if self.stage == "excise" and self.options.removed is None:
            raise ValueError("a cut needs the blocks that are removed")
        return self


class Block(Part):
    """One block and its costs."""

    index: Index
    kind: str
    parameters: Count
    bytes: Count
    active_parameters: Count = 0
    kv_bytes_per_token: Count = 0
    state_bytes: Count = 0
    latency_seconds: Positive | None = None


class Row(Part):
    """A constraint that the architecture asks for; what `constraints.LinearConstraint` takes."""

    model_config = ConfigDict(extra="forbid")

    name: str
    coefficients: list[Number]
    sense: Literal["==", "<=", ">="]
    rhs: Number
    reason: str = ""


class Stack(Part):
    """The blocks of the model."""

    path: str
    blocks: Annotated[list[Block], Field(min_length=1, max_length=MOST_BLOCKS)]
    total_parameters: Count
    total_bytes: Count
    legality: list[Row]

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if [b.index for b in self.blocks] != list(range(len(self.blocks))):
            raise ValueError("the blocks are not numbered from 0 in their order")
        if any(len(row.coefficients) != len(self.blocks) for row in self.legality):
            raise ValueError(f"legality needs a coefficient for each of {len(self.blocks)} blocks")
        return self


class Run(Part):
    """`run.json`."""

    config: Config
    stages: dict[str, Stage]
    blocks: Stack
    provenance: Provenance
    complete: bool = False

    @model_validator(mode="after")
    def _below(self) -> Self:
        n = len(self.blocks.blocks)
        if any(b >= n for s in self.stages.values() if s.done for b in s.options.removed or ()):
            raise ValueError(f"a stage removes a block that is not among the {n}")
        return self


class Level(Part):
    """A state with its energy."""

    removed: Blocks
    energy: Number


class Ranked(Level):
    """A state of a spectrum."""

    rank: Count


class Spectrum(Part):
    """`spectrum.json`."""

    n: Annotated[int, Field(ge=1, le=2**20)]
    unit: str
    solver: str
    seconds: Positive
    proven: bool
    lower_bound: Number | None
    info: dict[str, Any]
    states: Annotated[list[Ranked], Field(min_length=1)]

    @model_validator(mode="after")
    def _below(self) -> Self:
        if len(self.states) * self.n > _MOST_CELLS:
            raise ValueError(f"{len(self.states)} states of {self.n} blocks are too many")
        if any(b >= self.n for s in self.states for b in s.removed):
            raise ValueError(f"a state lacks a block that is not among the {self.n}")
        return self


class Loss(Part):
    """KL and NLL in nats per token, with standard errors over samples."""

    kl: Number
    kl_se: Positive | None
    nll: Number
    nll_se: Positive | None


class Measured(Level, Loss):
    """A state with its energy and its measured losses."""


class Chosen(Measured):
    """The state that was chosen."""

    position: Count
    why: str


class Correlations(Part):
    """How well an energy ranks losses."""

    n: Count
    spearman: Number | None
    spearman_low: Number | None
    spearman_high: Number | None
    kendall: Number | None
    kendall_low: Number | None
    kendall_high: Number | None


class Judged(Part):
    """The correlations of one energy with each loss."""

    kl: Correlations
    nll: Correlations | None = None
    kl_random_only: Correlations | None = None


class Candidates(Part):
    """`candidates.json`."""

    remove: str
    unit: str
    energy_unit: str
    samples: Some
    tokens: Some
    candidates: Annotated[list[Measured], Field(min_length=1)]
    random: list[Measured]
    fidelity: Judged
    fidelity_of_others: dict[str, Judged]
    chosen: Chosen
    proven: bool


class Perplexity(Part):
    """A model on some text."""

    perplexity: Positive
    perplexity_se: Positive | None
    nll: Number
    nll_se: Positive | None


class Side(Perplexity):
    """One of the two models of an evaluation; a streamed one has no speeds and no memory."""

    parameters: Some
    bytes: Some
    blocks: Some
    prefill_tokens_per_second: Positive | None = None
    decode_tokens_per_second: Positive | None = None
    prefill_tokens_per_second_se: Positive | None = None
    decode_tokens_per_second_se: Positive | None = None
    peak_memory_bytes: Count | None = None


class Generation(Part):
    """One text by both models."""

    prompt: str
    before: str
    after: str


class Evaluation(Part):
    """`evaluation.json`."""

    samples: Some
    tokens: Some
    before: Side
    after: Side
    kl: Number
    kl_se: Positive | None
    generation: Generation | None
    device: str
    dtype: str


class Baseline(Loss):
    """`baseline-NAME.json`."""

    baseline: str
    settings: list[str] = []
    removed: Blocks
    merges: list[Annotated[list[Index], Field(min_length=1)]]
    passes: Positive
    tokens_searched: Count
    violated: list[str]


class Healed(Perplexity):
    """The cut model on text held out, before or after healing."""

    kl: Number
    kl_se: Positive | None
    original_perplexity: Positive


class PatchedCut(Part):
    """What was folded into the block before one cut; older files do not say whether it changed."""

    block: Index
    layer: str
    changed: bool = True


class Patch(Part):
    """What the linear patch alone came to."""

    scores: Healed
    changed: bool = True
    cuts: list[PatchedCut] = []


class Step(Part):
    """A point of the training curve."""

    step: Count
    tokens: Count
    loss: Number


class HealOptions(Part):
    """The options of a healing."""

    __pydantic_extra__: dict[str, Scalar]
    patch: str
    method: str


class Healing(Part):
    """`healing.json`."""

    steps: list[Step]
    before: Healed
    after: Healed
    patch: Patch | None = None
    tokens_seen: Count = 0
    removed: Blocks
    of: Some
    report_tokens: Count
    options: HealOptions


class HealingWork(Part):
    """`identity.json` of an unfinished healing: what it depends on."""

    work: str
    training: str


class HealingCurve(Part):
    """The training curve up to a saved state."""

    steps: list[Step]


class HealingTargets(Part):
    """How many samples the teacher has answered."""

    samples: Count


class HealingTrained(HealingCurve):
    """What a finished training has to say."""

    tokens_seen: Count
    samples: Count
    processes: Some
    trained_parameters: Count


class HealedCandidate(Part):
    """A candidate after a little healing."""

    removed: Blocks
    kl: Number
    kl_se: Positive | None
    perplexity: Positive


class ComparedCandidate(HealedCandidate):
    """The same beside its KL before healing."""

    kl_before: Number


class HealedCandidates(Part):
    """`healed-candidates.json`."""

    candidates: Annotated[list[ComparedCandidate], Field(min_length=1)]
    chosen: ComparedCandidate


class Task(Part):
    """The scores of both models on one benchmark task."""

    task: str
    metric: str
    n: Count
    shots: Count
    original: Number
    original_se: Positive | None
    cut: Number
    cut_se: Positive | None
    difference: Number
    difference_low: Number
    difference_high: Number
    p_value: Number
    more_than_noise: bool


class TextScores(Part):
    """Both models on WikiText-2."""

    tokens: Count
    original: Perplexity
    cut: Perplexity
    kl: Number


class Benchmarks(Part):
    """`benchmarks.json`."""

    rows: list[Task]
    engine: str
    wikitext2: TextScores | None = None


class Scores(Part):
    """The scores of one model on one task, kept while the other is asked."""

    task: str
    metric: str
    values: Annotated[list[Number], Field(min_length=1)]
    questions: list[str]
    shots: Count


class Card(Part):
    """The parts of a cut checkpoint's model card."""

    base_model: str | None
    name: str
    removed: Blocks
    total: Some
    how: str
    measured: str
    from_gguf: bool
    isingcut: str
    energy: str
    rows: list[Annotated[list[str], Field(min_length=2, max_length=2)]]


class Removal(Part):
    """`isingcut.json` beside the weights of a cut checkpoint."""

    removed: Blocks
    of: Annotated[int, Field(ge=1, le=2**20)]
    card: Card | None = None

    @model_validator(mode="after")
    def _below(self) -> Self:
        if any(b >= self.of for b in self.removed):
            raise ValueError(f"a block is removed that is not among the {self.of}")
        return self


class Finalist(Part):
    """A state that a search measured last."""

    removed: Blocks


class SearchTarget(Part):
    """What a search found for one removal."""

    finalists: list[Finalist]


class Search(Part):
    """What a search for low states paid and found."""

    targets: dict[str, SearchTarget]


class EnergyMeta(Part):
    """The provenance of an energy, as far as it is read."""

    search: Search | None = None
    tokens: Count | None = None
    loss: str | None = None
    passes: Positive | None = None
    blocks_run: Count | None = None


class HamiltonianHeader(Part):
    """The header of `hamiltonian.safetensors`."""

    unit: str
    meta: EnergyMeta


class CalibrationHeader(Part):
    """The header of `calibration.safetensors`."""

    source: str
    sha256: str
    meta: dict[str, Any]


KINDS: dict[str, type[Part]] = {
    "run": Run,
    "spectrum": Spectrum,
    "candidates": Candidates,
    "evaluation": Evaluation,
    "baseline": Baseline,
    "healing": Healing,
    "healing-before": Healed,
    "healing-patched": Patch,
    "healing-work": HealingWork,
    "healing-curve": HealingCurve,
    "healing-targets": HealingTargets,
    "healing-trained": HealingTrained,
    "healed-candidate": HealedCandidate,
    "healed-candidates": HealedCandidates,
    "benchmarks": Benchmarks,
    "scores": Scores,
    "report": Part,
    "removal": Removal,
    "hamiltonian": HamiltonianHeader,
    "calibration": CalibrationHeader,
}
"""The models by the kind in a document's ``format``, ``isingcut-KIND``."""


def check(path: Path, kind: str, document: dict[str, Any]) -> None:
    """Refuse a document that is not what its kind holds.

    Raises:
        StageFileError: a part is missing, or of a wrong type, size or range; the first is named.
    """
    try:
        KINDS[kind].model_validate(document)
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise damaged(path, f"{place}: {_words(first)}" if place else _words(first)) from None


def fit(path: Path, found: Any, blocks: int) -> None:
    """Refuse the content of a run's file that is of another number of blocks than the run.

    Args:
        found: a document, a `Spectrum` or a `Hamiltonian`; anything else has no blocks.
        blocks: N of `run.json`.

    Raises:
        StageFileError: another N, or a block that the model does not have.
    """
    if isinstance(found, dict):
        n = found.get("n", found.get("of", blocks))
        highest = max(_named(found), default=-1)
    else:
        states = getattr(found, "states", None)
        n = getattr(found, "n", blocks) if states is None else int(states.shape[1])
        highest = -1
    if n != blocks:
        raise damaged(path, f"it is over {n} blocks, the run's model has {blocks}")
    if highest >= blocks:
        raise damaged(path, f"it names block {highest}, the run's model has {blocks}")


def _named(value: Any) -> Iterator[int]:
    """Every block that a document names."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "removed":
                yield from inner
            elif key == "merges":
                yield from (b for group in inner for b in group)
            else:
                yield from _named(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _named(inner)


def damaged(path: Path, what: str) -> StageFileError:
    """The error about a file whose content cannot be used."""
    return StageFileError(
        f"{path} is damaged: {what}; restore it, or delete it and run its stage again"
    )


def _words(error: Any) -> str:
    if error["type"] == "missing":
        return "it is missing"
    words = str(error["msg"]).removeprefix("Value error, ").replace("Input should be", "expected")
    found = error["input"]
    return words + (f", got {repr(found)[:60]}" if isinstance(found, Scalar) else "")
