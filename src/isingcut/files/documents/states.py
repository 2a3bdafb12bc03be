"""Documents about states: energies, spectra, rankings, baselines, and the record of a cut."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from isingcut.files.documents.parts import (
    Blocks,
    Count,
    CutProof,
    Index,
    MeasuredLoss,
    Number,
    PatchedCut,
    PatchTuning,
    Positive,
    Some,
    Strict,
    UnpatchedCut,
)

_MOST_CELLS = 2**28


class Level(Strict):
    """A state with its energy."""

    removed: Blocks
    energy: Number


class Ranked(Level):
    """A state of a spectrum."""

    rank: Count


class SpectrumFile(Strict):
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


class MeasuredState(Level, MeasuredLoss):
    """A state with its energy and its measured losses, by part where the text is a mixture."""

    parts: dict[str, MeasuredLoss] = Field(default_factory=dict)


class ChosenState(MeasuredState):
    """The state that was chosen."""

    position: Count
    why: str


class Correlations(Strict):
    """How well an energy ranks losses."""

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
    """A choice among candidates by questions."""

    tasks: list[str]
    by_task: dict[str, Count]
    asked: list[str]
    ahead: bool
    alpha: Positive
    looks: Count
    looks_planned: Count
    candidates: Annotated[list[AskedCandidate], Field(min_length=1)]


class OnePassState(Strict):
    """What a method that runs the original once would remove."""

    method: str
    removed: Blocks


class OnePassLoss(OnePassState, MeasuredLoss):
    """The same, measured."""


class OnePass(Strict):
    """What one pass chooses, and what was paid for it and for the search."""

    states: list[OnePassLoss]
    passes: Positive
    search_passes: Positive
    searched_for: Some


class CandidatesFile(Strict):
    """`candidates.json`."""

    remove: str
    unit: str
    energy_unit: str
    samples: Some
    tokens: Some
    candidates: Annotated[list[MeasuredState], Field(min_length=1)]
    random: list[MeasuredState]
    # Older files measured them on all tokens, and do not say so.
    random_tokens: Count | None = None
    fidelity: Judged
    fidelity_of_others: dict[str, Judged]
    chosen: ChosenState
    by_tasks: ByTasks | None = None
    one_pass: OnePass | None = None
    proven: bool


class BaselineFile(MeasuredLoss):
    """`baseline-NAME.json`; older ones may be of methods that merged blocks."""

    baseline: str
    settings: list[str] = Field(default_factory=list)
    removed: Blocks
    merges: list[Annotated[list[Index], Field(min_length=1)]] = Field(default_factory=list)
    passes: Positive
    tokens_searched: Count
    violated: list[str]


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

    cuts: list[PatchedCut]
    changed: bool
    unpatched: list[UnpatchedCut]
    text: FittedText | None = None
    proof: CutProof | None = None
    tuning: PatchTuning | None = None


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


class CutRecord(Strict):
    """`isingcut.json` beside the weights of a cut checkpoint."""

    removed: Blocks
    of: Annotated[int, Field(ge=1, le=2**20)]
    card: CardParts | None = None
    proof: CutProof | None = None
    patch: PatchRecord | None = None

    @model_validator(mode="after")
    def _below(self) -> Self:
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


class HamiltonianHeader(Strict):
    """The header of `hamiltonian.safetensors`."""

    unit: str
    meta: EnergyMeta


class CalibrationHeader(Strict):
    """The header of `calibration.safetensors`."""

    source: str
    sha256: str
    meta: dict[str, Any]
