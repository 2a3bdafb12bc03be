"""The content of each JSON file of a run folder and of a cut checkpoint, as pydantic models.

A stage builds the object, `results.write_document` writes it and `results.read_document` reads it
back. A model lists the keys that version 1 always has, with types, sizes and ranges, so that code
that reads a document can rely on them. Unknown keys are allowed, so that older and newer files of
the same version still open. The headers of safetensors files (`results.read_tensors`) are
documents too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from isingcut.errors import StageFileError

_MOST_CELLS = 2**28

# Its square and sums are finite too: a report scales, adds and draws these numbers.
Number = Annotated[float, Field(ge=-1e30, le=1e30)]
Positive = Annotated[float, Field(ge=0, le=1e30)]
Count = Annotated[int, Field(ge=0, le=10**18)]
Some = Annotated[int, Field(ge=1, le=10**18)]
Scalar = str | int | float | bool | None


def _check_distinct(blocks: list[int]) -> list[int]:
    if len(set(blocks)) < len(blocks):
        raise ValueError("a block appears twice")
    return blocks


Index = Annotated[int, Field(ge=0, le=2**31)]
Blocks = Annotated[list[Index], Field(max_length=2**20), AfterValidator(_check_distinct)]


class Strict(BaseModel):
    """An object inside a document: strict types, finite numbers, unknown keys allowed."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    def content(self) -> dict[str, Any]:
        """Return the JSON-able content, without the keys that were not set."""
        return self.model_dump(exclude_unset=True)


class Document(Strict):
    """A whole file, or the header of a file, whose ``format`` is ``isingcut-KIND``."""

    kind: ClassVar[str]

    def __init_subclass__(cls, *, kind: str) -> None:
        cls.kind = kind


class MeasuredLoss(Strict):
    """KL and NLL in nats per token, with standard errors over samples."""

    kl: Number
    kl_se: Positive | None
    nll: Number
    nll_se: Positive | None


class Perplexity(Strict):
    """The perplexity of a model on a text.

    Attributes:
        draft_acceptance: share of the tokens drafted by its MTP layers that it predicts itself.
    """

    perplexity: Positive
    perplexity_se: Positive | None
    nll: Number
    nll_se: Positive | None
    draft_acceptance: Positive | None = None
    draft_acceptance_se: Positive | None = None


class PatchedCut(Strict):
    """The map that was folded into the block before one cut; older files lack `changed`."""

    removed: list[Index] | None = None
    block: Index
    layer: str
    ridge: Number | None = None
    held_out_error_left: Number | None = None
    exact: bool = False
    tokens: Count | None = None
    changed: bool = True


class TunedLayer(Strict):
    """A tuned layer next to a cut."""

    block: Index
    layer: str


class PatchTuning(Strict):
    """The result of tuning a patch: the KL before and after, or why it was not tuned."""

    left_out: str = ""
    layers: list[TunedLayer] = Field(default_factory=list)
    steps: Count = 0
    predictions: Count = 0
    held_out_predictions: Count = 0
    held_out_kl: list[Number] = Field(default_factory=list)


class UnpatchedCut(Strict):
    """A cut without a patch: its first and last block, and the reason."""

    removed: list[Index]
    reason: str


class CutProof(Strict):
    """The result of comparing a checkpoint with its original."""

    inputs: str
    difference: Positive
    remarks: list[str]


class Level(Strict):
    """A state with its energy."""

    removed: Blocks
    energy: Number


class Ranked(Level):
    """A state of a spectrum."""

    rank: Count


class SpectrumFile(Document, kind="spectrum"):
    """`spectrum.json`.

    Attributes:
        searched: number of states that a search had measured; these are not in the file.
    """

    n: Annotated[int, Field(ge=1, le=2**20)]
    unit: str
    solver: str
    seconds: Positive
    proven: bool
    lower_bound: Number | None
    info: dict[str, Any]
    states: Annotated[list[Ranked], Field(min_length=1)]
    searched: Count = 0

    @model_validator(mode="after")
    def _check_blocks(self) -> Self:
        if len(self.states) * self.n > _MOST_CELLS:
            raise ValueError(f"{len(self.states)} states of {self.n} blocks are too many")
        if any(b >= self.n for s in self.states for b in s.removed):
            raise ValueError(f"a state removes a block outside 0 to {self.n - 1}")
        return self


class MeasuredState(MeasuredLoss, Level):
    """A state with its energy and its measured losses, by source if the text is a mixture.

    Attributes:
        above_lowest_se: paired standard error of its KL minus the lowest.
        patched_kl: its KL after a patch, of candidates near the lowest.
    """

    parts: dict[str, MeasuredLoss] = Field(default_factory=dict)
    above_lowest_se: Positive | None = None
    patched_kl: Number | None = None


class ChosenState(MeasuredState):
    """The chosen state."""

    position: Count
    why: str


class Correlations(Strict):
    """How well an energy ranks losses, with the ends of intervals over states."""

    n: Count
    spearman: Number | None
    spearman_low: Number | None
    spearman_high: Number | None


class Judged(Strict):
    """The correlations of one energy with each loss."""

    kl: Correlations
    nll: Correlations | None = None
    kl_random_only: Correlations | None = None


class ScoredCandidate(Strict):
    """A candidate's score on the questions, compared with the chosen candidate's."""

    removed: Blocks
    questions: Count
    accuracy: Number | None
    # Older files chose by accuracy.
    certainty: Number | None = None
    dropped: bool
    difference: Number | None
    difference_se: Positive | None
    p_value: Positive | None


class ByTasks(Strict):
    """A choice among candidates by questions.

    Attributes:
        tasks: names of the tasks.
        by_task: number of questions used of each task.
        asked: keys of the questions used.
        ahead: all other candidates were dropped.
        alpha: probability of wrongly dropping a candidate.
        looks: number of comparisons made, of ``looks_planned``.
    """

    ahead: bool
    alpha: Positive
    looks: Count
    looks_planned: Count
    by_task: dict[str, Count]
    asked: list[str]
    candidates: Annotated[list[ScoredCandidate], Field(min_length=1)]
    tasks: list[str]


class OnePassState(Strict):
    """The blocks that a method with one pass of the original would remove."""

    method: str
    removed: Blocks


class OnePassLoss(MeasuredState):
    """A `OnePassState` with its measured losses."""

    method: str


class OnePass(Strict):
    """The choices of one-pass methods, and the cost of the pass and of the search."""

    states: list[OnePassLoss]
    passes: Positive
    search_passes: Positive
    searched_for: Some


class CandidatesFile(Document, kind="candidates"):
    """`candidates.json`."""

    remove: str
    unit: str
    energy_unit: str
    samples: Some
    tokens: Some
    candidates: Annotated[list[MeasuredState], Field(min_length=1)]
    random: list[MeasuredState]
    # Older files measured them on all tokens and lack this key.
    random_tokens: Count | None = None
    random_distribution: str = ""
    fidelity: Judged
    fidelity_of_others: dict[str, Judged]
    chosen: ChosenState
    original: dict[str, Number] = Field(default_factory=dict)
    proven: bool
    solver: str = ""
    one_pass: OnePass | None = None
    by_tasks: ByTasks | None = None


class BaselineFile(Document, kind="baseline"):
    """`baseline-NAME.json`."""

    baseline: str
    options: dict[str, Any] = Field(default_factory=dict)
    settings: list[str] = Field(default_factory=list)
    removed: Blocks
    kl: Number
    kl_se: Positive | None
    nll: Number
    nll_se: Positive | None
    passes: Positive
    heads: Positive = 0.0
    tokens_searched: Count
    tokens_judged: Count = 0
    violated: list[str]
    info: dict[str, Any] = Field(default_factory=dict)


class FittedText(Strict):
    """The text that a patch was fitted on."""

    source: str
    samples: Count
    searched: Count
    tokens: Count
    asked: Count
    short: str


class PatchRecord(Strict):
    """The patched layers of a cut, the text of the fit, and the proof."""

    unpatched: list[UnpatchedCut]
    maps: str = ""
    changed: bool
    cuts: list[PatchedCut]
    tuning: PatchTuning | None = None
    proof: CutProof | None = None
    text: FittedText | None = None


class CardParts(Strict):
    """The parts of a cut checkpoint's model card.

    Attributes:
        mtp: layers for multi-token prediction in the original.
        drop_mtp: whether the cut left these out.
    """

    base_model: str | None
    name: str
    removed: Blocks
    total: Some
    how: str
    measured: str
    from_gguf: bool
    # Older records lack it.
    loads_with: Annotated[str, Field(pattern=r"^[A-Za-z]\w{0,99}$")] = "AutoModelForCausalLM"
    isingcut: str
    energy: str
    rows: list[Annotated[list[str], Field(min_length=2, max_length=2)]]
    proof: str = "text"
    patch: PatchRecord | None = None
    mtp: Count = 0
    drop_mtp: bool = False


class CutRecord(Document, kind="removal"):
    """`isingcut.json` in the folder of a cut checkpoint."""

    removed: Blocks
    of: Annotated[int, Field(ge=1, le=2**20)]
    model: dict[str, Scalar] = Field(default_factory=dict)
    card: CardParts | None = None
    proof: CutProof | None = None
    patch: PatchRecord | None = None

    @model_validator(mode="after")
    def _check_blocks(self) -> Self:
        if any(b >= self.of for b in self.removed):
            raise ValueError(f"a removed block is outside 0 to {self.of - 1}")
        return self


class Finalist(Strict):
    """A state among the best of a search."""

    removed: Blocks


class SearchTarget(Strict):
    """The result of a search for one removal."""

    finalists: list[Finalist]
    one_pass: list[OnePassState] = Field(default_factory=list)


class SearchRecord(Strict):
    """The cost and the results of a search."""

    targets: dict[str, SearchTarget]
    passes: Positive | None = None
    one_pass_passes: Positive | None = None


class EnergyMeta(Strict):
    """The provenance of an energy, as far as isingcut reads it."""

    search: SearchRecord | None = None
    tokens: Count | None = None
    loss: str | None = None
    passes: Positive | None = None
    blocks_run: Count | None = None


class HamiltonianHeader(Document, kind="hamiltonian"):
    """The header of `hamiltonian.safetensors`."""

    unit: str
    meta: EnergyMeta


class CalibrationHeader(Document, kind="calibration"):
    """The header of `calibration.safetensors`."""

    source: str
    sha256: str
    meta: dict[str, Any]


# Evaluations, healings and benchmarks


class ModelScores(Perplexity):
    """The scores of one model of an evaluation; a streamed model has no speed and memory."""

    prefill_tokens_per_second: Positive | None = None
    prefill_tokens_per_second_se: Positive | None = None
    decode_tokens_per_second: Positive | None = None
    decode_tokens_per_second_se: Positive | None = None
    parameters: Some
    bytes: Some
    blocks: Some
    peak_memory_bytes: Count | None = None


class Generation(Strict):
    """The continuation of one prompt by both models."""

    prompt: str
    before: str
    after: str


class PairScores(Strict):
    """The original and another model on the same text.

    Attributes:
        nll_change_se: paired standard error of the difference of the NLLs.
    """

    before: Perplexity
    after: Perplexity
    kl: Number
    kl_se: Positive | None
    nll_change_se: Positive | None = None


class PartScores(PairScores):
    """`PairScores` on one source of a mixture."""

    samples: Some
    tokens: Some


class MixedScores(PairScores):
    """`PairScores` on the whole text, and by source if it is a mixture."""

    parts: dict[str, PartScores] = Field(default_factory=dict)


class FurtherPart(Perplexity):
    """A model between the original and the last one, on one part of a mixture."""

    kl: Number
    kl_se: Positive | None


class FurtherScores(FurtherPart):
    """`FurtherPart` on the whole text, and by source if it is a mixture."""

    parts: dict[str, FurtherPart] = Field(default_factory=dict)
    elsewhere: dict[str, FurtherPart] = Field(default_factory=dict)


class PackedScores(FurtherScores):
    """`FurtherScores` of the cut GGUF file, unpacked to bfloat16."""

    bytes: Some


class EvaluationFile(Document, kind="evaluation"):
    """`evaluation.json`; older files do not name the last model.

    Attributes:
        gguf_unread: why the cut GGUF file beside the checkpoint was not measured.
        no_drafts: why the drafts of its MTP layers were not measured.
        elsewhere: the models on unrelated texts, which no choice or fit used.
        not_measured: keys of speed and memory that were skipped.
        streamed: a model was read from disk block by block, so its speed is unknown.
    """

    last: Literal["cut", "patched", "healed"] | None = None
    unpatched: list[UnpatchedCut] = Field(default_factory=list)
    cut: FurtherScores | None = None
    patched: FurtherScores | None = None
    gguf: PackedScores | None = None
    gguf_unread: str = ""
    no_drafts: str = ""
    samples: Some
    tokens: Some
    before: ModelScores
    after: ModelScores
    kl: Number
    kl_se: Positive | None
    nll_change_se: Positive | None = None
    parts: dict[str, PartScores] = Field(default_factory=dict)
    elsewhere: dict[str, PartScores] = Field(default_factory=dict)
    generation: Generation | None
    device: str
    dtype: str
    threads: Some | None = None
    not_measured: list[str] = Field(default_factory=list)
    streamed: bool = False


class HealedPart(FurtherPart):
    """The cut model on unseen text, or on one source of it, before or after healing."""

    original_perplexity: Positive


class HealedScores(HealedPart, Document, kind="healing-before"):
    """`HealedPart` on the whole text, and by source if it is a mixture."""

    parts: dict[str, HealedPart] = Field(default_factory=dict)


class PatchScores(Document, kind="healing-patched"):
    """The scores after the linear patch alone; none if nothing could be patched."""

    scores: HealedScores | None = None
    changed: bool = True
    cuts: list[PatchedCut] = Field(default_factory=list)
    unpatched: list[UnpatchedCut] = Field(default_factory=list)
    tuning: PatchTuning | None = None


class Step(Strict):
    """A point of the training curve."""

    step: Count
    tokens: Count
    loss: Number


class HealingRecipe(Document, kind="healing-recipe"):
    """The settings of a training, from its options or from a budget of tokens or time.

    Attributes:
        steps: optimiser steps, which end the schedule too.
        batch: sequences per step, over all processes.
        length: tokens of the longest sequence.
        learning_rate: the highest learning rate.
        tokens: approximate tokens of all steps.
        seconds: their estimated time, from the first steps; None for a budget in tokens.
        epochs: number of passes over the text.
    """

    steps: Some
    batch: Some
    length: Some
    learning_rate: Positive
    tokens: Count
    seconds: Positive | None
    epochs: Positive


class HealingCheck(Strict):
    """The KL to the original, summed over each unseen sample, at one step of a training."""

    step: Count
    kl_sums: list[Number]


class HealingStop(Strict):
    """Why a training ended early, and the step of its weights (None: the last step)."""

    why: str
    kept: Count | None


class HealOptions(Strict):
    """The options of a healing."""

    __pydantic_extra__: dict[str, Scalar]
    patch: str
    method: str
    effort: str = ""
    length: Count | None = None


class HealingFile(Document, kind="healing"):
    """`healing.json`."""

    steps: list[Step]
    before: HealedScores
    after: HealedScores
    patch: PatchScores | None = None
    unpatched: list[UnpatchedCut] = Field(default_factory=list)
    start: Literal["cut", "patched", "healed"] = "cut"
    tokens_seen: Count = 0
    recipe: HealingRecipe | None = None
    checks: list[HealingCheck] = Field(default_factory=list)
    stopped: HealingStop | None = None
    removed: Blocks
    of: Some
    length: Some | None = None
    report_samples: Count = 0
    report_tokens: Count
    provenance: dict[str, Any] = Field(default_factory=dict)
    seconds: Positive = 0.0
    overlap: dict[str, Positive] = Field(default_factory=dict)
    options: HealOptions


class HealingWork(Document, kind="healing-work"):
    """`identity.json` of an unfinished healing: everything that its result depends on."""

    work: str


class HealingCurve(Document, kind="healing-curve"):
    """The training curve up to a saved state."""

    steps: list[Step]
    checks: list[HealingCheck]
    trained_parameters: Count


class HealingMemory(Document, kind="healing-memory"):
    """How a training fits into the memory.

    Attributes:
        most: most tokens of a micro-batch, padding included; a single sample may have more.
        recompute: whether activations are recomputed in the backward pass.
        sharded: whether FSDP or DeepSpeed shards the model.
    """

    most: Some
    recompute: bool
    sharded: bool = False


class PairedScores(Strict):
    """Two models on the same questions.

    Attributes:
        original, cut: mean scores.
        difference: cut minus original, with the ends of its 95 % interval.
        n: number of questions.
        p_value: two-sided p-value of the test ``mcnemar`` or ``bootstrap``.
        more_than_noise: significant at the 5 % level, for this comparison alone.
    """

    original: Number
    original_se: Positive | None
    cut: Number
    cut_se: Positive | None
    difference: Number
    difference_low: Number
    difference_high: Number
    n: Count
    p_value: Number
    test: str = ""
    more_than_noise: bool


class TaskRow(PairedScores):
    """The scores of both models on one benchmark task."""

    task: str
    metric: str
    shots: Count


class TextScores(Strict):
    """Both models on WikiText-2."""

    samples: Count = 0
    tokens: Count
    original: Perplexity
    cut: Perplexity
    kl: Number
    kl_se: Positive | None = None
    nll_change_se: Positive | None = None


class BenchmarksFile(Document, kind="benchmarks"):
    """`benchmarks.json`."""

    rows: list[TaskRow]
    engine: str
    left_out: Count = 0
    wikitext2: TextScores | None = None


class ReportFile(Document, kind="report"):
    """`report.json`, which isingcut never reads."""


# `run.json`

_MOST_BLOCKS = 4096
"""More blocks than any model has. The plots of a run grow with their square."""


class ModelIdentity(Strict):
    """The identity of a run's model."""

    sha256: str
    weight_bytes: Count = 0
    gguf_sha256: str | None = None
    name: str


class SplitSize(Strict):
    """The size of one token split."""

    samples: Count
    tokens: Count
    parts: dict[str, SplitSize] = Field(default_factory=dict)


class CalibrationText(Strict):
    """The calibration text of a run."""

    source: str
    sha256: str
    splits: dict[str, SplitSize]
    overlap: dict[str, Positive] = Field(default_factory=dict)


class RequestedCompute(Strict):
    """How the options say that measurements are computed."""

    attention: str
    batch_tokens: Some | None


class Computed(Strict):
    """How measurements were computed on one device."""

    asked: RequestedCompute
    # For any other name transformers would download code from the hub.
    attention: Literal["sdpa", "eager", "causal"] | None
    batch_tokens: Some
    threads: Annotated[int, Field(ge=1, le=4096)] | None = None


class Places(Strict):
    """The path of a local model when it was read."""

    absolute: str
    relative: str


class WeightsRead(Strict):
    """How often a streamed model was read."""

    sweeps: Positive


class Provenance(Strict):
    """What the figures of a run were made with."""

    isingcut: str
    python: str
    torch: str
    transformers: str
    platform: str
    cpu: str
    command_line: str
    created: str
    model: ModelIdentity
    calibration: CalibrationText | None = None
    computed: dict[str, Computed] = Field(default_factory=dict)
    reading: dict[str, WeightsRead] = Field(default_factory=dict)
    model_path: Places | None = None
    dtype: str | None = None


class Config(Strict):
    """The options of a run; `RunConfig` checks the rest."""

    __pydantic_extra__: dict[str, Scalar]
    model: str
    remove: str = ""
    energy: str
    seed: int
    budget: str = ""
    linear: bool = False
    quick: bool = False


class StageOptions(Strict):
    """The options of a stage, as far as isingcut reads them."""

    remove: str | int | None = None
    budget: str = ""
    removed: Blocks | None = None
    texts: dict[str, Any] | None = None


class StageRecord(Strict):
    """The record of one stage."""

    stage: str
    done: bool
    fingerprint: str
    options: StageOptions
    seconds: Positive | None = None
    sha256: str | None = None
    # Set if memory was short: blocks were read from disk, with this many tokens per micro-batch.
    streamed: bool = False
    most_tokens: Some | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.done and self.seconds is None:
            raise ValueError("a finished stage lacks its seconds")
        if self.stage == "excise" and self.options.removed is None:
            raise ValueError("a cut lacks its removed blocks")
        return self


class BlockCosts(Strict):
    """One block and its costs."""

    index: Index
    kind: str
    parameters: Count
    bytes: Count
    active_parameters: Count = 0
    kv_bytes_per_token: Count = 0
    state_bytes: Count = 0
    latency_seconds: Positive | None = None


class LegalityRow(Strict):
    """A constraint of the architecture: the arguments of `constraints.LinearConstraint`."""

    model_config = ConfigDict(extra="forbid")

    name: str
    coefficients: list[Number]
    sense: Literal["==", "<=", ">="]
    rhs: Number
    reason: str = ""


class PackedModel(Strict):
    """What a whole model takes in a GGUF file.

    Attributes:
        type: of its weights: "Q5_0", ...; "" if they stay as they are.
        bytes: of each block, in the file.
        read: of these, what is read per token.
        other: bytes outside the blocks.
        read_other: of these, what is read per token.
        read_before: bytes of weights that the model as it is reads per token.
    """

    type: str
    bytes: list[Count]
    read: list[Count]
    other: Count
    read_other: Count
    read_before: Count

    def size(self, removed: Blocks) -> int:
        """Return the bytes of the file without some blocks."""
        return self.other + sum(size for i, size in enumerate(self.bytes) if i not in removed)


class BlockList(Strict):
    """The blocks of the model."""

    path: str
    blocks: Annotated[list[BlockCosts], Field(min_length=1, max_length=_MOST_BLOCKS)]
    total_parameters: Count
    total_bytes: Count
    legality: list[LegalityRow]
    packed: PackedModel | None = None

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if [b.index for b in self.blocks] != list(range(len(self.blocks))):
            raise ValueError("the blocks are not numbered 0, 1, 2, ...")
        if any(len(row.coefficients) != len(self.blocks) for row in self.legality):
            raise ValueError(f"legality needs a coefficient for each of {len(self.blocks)} blocks")
        return self


class PackedLosses(Strict):
    """A type of a packed model: its KL on the ranking text, whole and without some blocks.

    Attributes:
        packed: its costs.
        kl: of the whole model, if it was measured; always if it meets the budget.
        fits: whether the whole model meets the budget.
        removed: the best state of one pass of the original that meets it.
        cut_kl: of that state, not packed.
        measured: of that state, patched and packed.
    """

    packed: PackedModel
    kl: Number | None = None
    kl_se: Positive | None = None
    fits: bool = False
    removed: Blocks = Field(default_factory=list)
    cut_kl: Number | None = None
    measured: Number | None = None
    measured_se: Positive | None = None

    @property
    def predicted(self) -> float | None:
        """The KL of the state in this type: the sum of both alone."""
        return None if self.kl is None or self.cut_kl is None else self.kl + self.cut_kl

    @property
    def loss(self) -> float:
        """The measured KL of what meets the budget; infinite without one."""
        found = self.kl if self.fits else self.measured
        return float("inf") if found is None else found


class PackingFile(Document, kind="packing"):
    """`packing.json`: the types that a budget was measured for.

    Attributes:
        chosen: the place of the chosen one.
    """

    budget: str
    types: Annotated[list[PackedLosses], Field(min_length=1)]
    chosen: Count

    @property
    def best(self) -> PackedLosses:
        """The chosen type."""
        return self.types[self.chosen]


class RunFile(Document, kind="run"):
    """`run.json`: options, provenance, blocks, and one record per stage by its file's name."""

    config: Config
    stages: dict[str, StageRecord]
    blocks: BlockList
    provenance: Provenance
    complete: bool = False

    @model_validator(mode="after")
    def _below(self) -> Self:
        n = len(self.blocks.blocks)
        if any(b >= n for s in self.stages.values() if s.done for b in s.options.removed or ()):
            raise ValueError(f"a stage removes a block outside 0 to {n - 1}")
        return self


# Reading them

KINDS: dict[str, type[Document]] = {model.kind: model for model in Document.__subclasses__()}
"""The pydantic model of each kind of document, by the KIND in its ``format``."""


def parse_content(path: Path, kind: str, content: dict[str, Any]) -> Document:
    """Parse the content of a document.

    Raises:
        StageFileError: a key is missing, or has a wrong type, size or range; the message names it.
    """
    try:
        return KINDS[kind].model_validate(content)
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise damaged_error(path, f"{place}: {_words(first)}" if place else _words(first)) from None


def check_blocks(path: Path, found: Any, blocks: int) -> None:
    """Check that a file of a run has the run's number of blocks.

    Args:
        found: a document, a `Spectrum` or a `Hamiltonian`; anything else has no blocks.
        blocks: N of `run.json`.

    Raises:
        StageFileError: another N, or a block that the model does not have.
    """
    shape = getattr(getattr(found, "states", None), "shape", None)
    n = int(shape[1]) if shape else getattr(found, "n", getattr(found, "of", blocks))
    highest = max(_list_blocks(found), default=-1)
    if n != blocks:
        raise damaged_error(path, f"it is for {n} blocks, but the run's model has {blocks}")
    if highest >= blocks:
        raise damaged_error(path, f"it names block {highest}; the run's model has {blocks} blocks")


def _list_blocks(value: Any) -> Iterator[int]:
    """Yield every block number in a document."""
    if isinstance(value, Strict):
        value = dict(value)
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from (inner or ()) if key == "removed" else _list_blocks(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _list_blocks(inner)


def damaged_error(path: Path, what: str) -> StageFileError:
    """Return the error for a file with unusable content."""
    return StageFileError(
        f"{path} is damaged: {what}; restore the file, or delete it and run its stage again"
    )


def _words(error: Any) -> str:
    if error["type"] == "missing":
        return "missing"
    words = str(error["msg"]).removeprefix("Value error, ").replace("Input should be", "expected")
    found = error["input"]
    return words + (f", got {repr(found)[:60]}" if isinstance(found, Scalar) else "")
