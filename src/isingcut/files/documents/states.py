"""Documents about states: energies, spectra, rankings, baselines, and the record of a cut."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

_MOST_CELLS = 2**28

# A number whose square and sums are finite too: a report scales, adds and draws them.
Number = Annotated[float, Field(ge=-1e30, le=1e30)]
Positive = Annotated[float, Field(ge=0, le=1e30)]
Count = Annotated[int, Field(ge=0, le=10**18)]
Some = Annotated[int, Field(ge=1, le=10**18)]
Scalar = str | int | float | bool | None


def _check_distinct(blocks: list[int]) -> list[int]:
    if len(set(blocks)) < len(blocks):
        raise ValueError("a block is named twice")
    return blocks


Index = Annotated[int, Field(ge=0, le=2**31)]
Blocks = Annotated[list[Index], Field(max_length=2**20), AfterValidator(_check_distinct)]


class Strict(BaseModel):
    """An object inside a document: strict types, finite numbers, unknown keys let through."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    def content(self) -> dict[str, Any]:
        """What it was made of, JSON-able: keys that were not given are left out."""
        return self.model_dump(exclude_unset=True)


class Document(Strict):
    """A whole file, or the header of one, whose ``format`` is ``isingcut-KIND``."""

    kind: ClassVar[str] = ""


class MeasuredLoss(Strict):
    """KL and NLL in nats per token, with standard errors over samples."""

    kl: Number
    kl_se: Positive | None
    nll: Number
    nll_se: Positive | None


class Perplexity(Strict):
    """A model on some text."""

    perplexity: Positive
    perplexity_se: Positive | None
    nll: Number
    nll_se: Positive | None


class PatchedCut(Strict):
    """What was folded into the block before one cut; older files do not say whether it changed."""

    removed: list[Index] | None = None
    block: Index
    layer: str
    ridge: Number | None = None
    held_out_error_left: Number | None = None
    exact: bool = False
    tokens: Count | None = None
    changed: bool = True


class TunedLayer(Strict):
    """A layer beside a cut."""

    block: Index
    layer: str


class PatchTuning(Strict):
    """What tuning a patch came to, KL before and after each reading; or why there was none."""

    left_out: str = ""
    layers: list[TunedLayer] = Field(default_factory=list)
    steps: Count = 0
    predictions: Count = 0
    held_out_predictions: Count = 0
    held_out_kl: list[Number] = Field(default_factory=list)


class UnpatchedCut(Strict):
    """A cut without a patch: its first and last block, and why."""

    removed: list[Index]
    reason: str


class CutProof(Strict):
    """What the comparison of a checkpoint with its original showed."""

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


class SpectrumFile(Document):
    """`spectrum.json`.

    Attributes:
        searched: how many of the states a search had measured; in the file there are none.
    """

    kind: ClassVar = "spectrum"
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
            raise ValueError(f"a state lacks a block that is not among the {self.n}")
        return self


class MeasuredState(MeasuredLoss, Level):
    """A state with its energy and its measured losses, by part where the text is a mixture.

    Attributes:
        above_lowest_se: standard error of its KL minus the lowest, sample by sample.
    """

    parts: dict[str, MeasuredLoss] = Field(default_factory=dict)
    above_lowest_se: Positive | None = None


class ChosenState(MeasuredState):
    """The state that was chosen."""

    position: Count
    why: str


class Correlations(Strict):
    """How well an energy ranks losses; the ends of intervals over states."""

    n: Count
    spearman: Number | None
    spearman_low: Number | None
    spearman_high: Number | None
    kendall: Number | None
    kendall_low: Number | None
    kendall_high: Number | None


class Judged(Strict):
    """The correlations of one energy with each loss."""

    kl: Correlations
    nll: Correlations | None = None
    kl_random_only: Correlations | None = None


class AskedCandidate(Strict):
    """A candidate that was asked questions, against the one that was chosen."""

    removed: Blocks
    questions: Count
    accuracy: Number | None
    # Older files chose by the share of right answers.
    certainty: Number | None = None
    dropped: bool
    difference: Number | None
    difference_se: Positive | None
    p_value: Positive | None


class ByTasks(Strict):
    """A choice among candidates by questions.

    Attributes:
        tasks: their names; ``by_task`` how many questions of each were asked, ``asked`` their keys.
        ahead: all other candidates were dropped.
        alpha: chance of dropping one wrongly.
        looks: how often they were compared, of ``looks_planned``.
    """

    ahead: bool
    alpha: Positive
    looks: Count
    looks_planned: Count
    by_task: dict[str, Count]
    asked: list[str]
    candidates: Annotated[list[AskedCandidate], Field(min_length=1)]
    tasks: list[str]


class OnePassState(Strict):
    """What a method that runs the original once would remove."""

    method: str
    removed: Blocks


class OnePassLoss(MeasuredState):
    """The same, measured."""

    method: str


class OnePass(Strict):
    """What one pass chooses, and what was paid for it and for the search."""

    states: list[OnePassLoss]
    passes: Positive
    search_passes: Positive
    searched_for: Some


class CandidatesFile(Document):
    """`candidates.json`."""

    kind: ClassVar = "candidates"
    remove: str
    unit: str
    energy_unit: str
    samples: Some
    tokens: Some
    candidates: Annotated[list[MeasuredState], Field(min_length=1)]
    random: list[MeasuredState]
    # Older files measured them on all tokens, and do not say so.
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


class BaselineFile(Document):
    """`baseline-NAME.json`."""

    kind: ClassVar = "baseline"
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
    """What was patched of a cut, on which text, and how that was proven."""

    unpatched: list[UnpatchedCut]
    maps: str = ""
    changed: bool
    cuts: list[PatchedCut]
    tuning: PatchTuning | None = None
    proof: CutProof | None = None
    text: FittedText | None = None


class CardParts(Strict):
    """The parts of a cut checkpoint's model card."""

    base_model: str | None
    name: str
    removed: Blocks
    total: Some
    how: str
    measured: str
    from_gguf: bool
    # Records that an earlier version wrote lack it.
    loads_with: Annotated[str, Field(pattern=r"^[A-Za-z]\w{0,99}$")] = "AutoModelForCausalLM"
    isingcut: str
    energy: str
    rows: list[Annotated[list[str], Field(min_length=2, max_length=2)]]
    proof: str = "text"
    patch: PatchRecord | None = None


class CutRecord(Document):
    """`isingcut.json` beside the weights of a cut checkpoint."""

    kind: ClassVar = "removal"
    removed: Blocks
    of: Annotated[int, Field(ge=1, le=2**20)]
    model: dict[str, Scalar] = Field(default_factory=dict)
    card: CardParts | None = None
    proof: CutProof | None = None
    patch: PatchRecord | None = None

    @model_validator(mode="after")
    def _check_blocks(self) -> Self:
        if any(b >= self.of for b in self.removed):
            raise ValueError(f"a block is removed that is not among the {self.of}")
        return self


class Finalist(Strict):
    """A state that a search measured last."""

    removed: Blocks


class SearchTarget(Strict):
    """What a search found for one removal."""

    finalists: list[Finalist]
    one_pass: list[OnePassState] = Field(default_factory=list)


class SearchRecord(Strict):
    """What a search for low states paid and found."""

    targets: dict[str, SearchTarget]
    passes: Positive | None = None
    one_pass_passes: Positive | None = None


class EnergyMeta(Strict):
    """The provenance of an energy, as far as it is read."""

    search: SearchRecord | None = None
    tokens: Count | None = None
    loss: str | None = None
    passes: Positive | None = None
    blocks_run: Count | None = None


class HamiltonianHeader(Document):
    """The header of `hamiltonian.safetensors`."""

    kind: ClassVar = "hamiltonian"
    unit: str
    meta: EnergyMeta


class CalibrationHeader(Document):
    """The header of `calibration.safetensors`."""

    kind: ClassVar = "calibration"
    source: str
    sha256: str
    meta: dict[str, Any]
