"""Documents about models: evaluations, healings, benchmarks, and what is kept under way."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from isingcut.files.documents.parts import (
    Blocks,
    Count,
    Number,
    PatchedCut,
    PatchTuning,
    Perplexity,
    Positive,
    Scalar,
    Some,
    Strict,
    UnpatchedCut,
)


class ModelScores(Perplexity):
    """One of the two models of an evaluation; a streamed one has no speeds and no memory."""

    parameters: Some
    bytes: Some
    blocks: Some
    prefill_tokens_per_second: Positive | None = None
    decode_tokens_per_second: Positive | None = None
    prefill_tokens_per_second_se: Positive | None = None
    decode_tokens_per_second_se: Positive | None = None
    peak_memory_bytes: Count | None = None


class Generation(Strict):
    """One text by both models."""

    prompt: str
    before: str
    after: str


class PartScores(Strict):
    """The original and the last model on one part of a mixture."""

    samples: Some
    tokens: Some
    before: Perplexity
    after: Perplexity
    kl: Number
    kl_se: Positive | None


class FurtherPart(Perplexity):
    """A model between the original and the last one, on one part of a mixture."""

    kl: Number
    kl_se: Positive | None


class FurtherScores(FurtherPart):
    """The same on all of the text, and by part where it is a mixture."""

    parts: dict[str, FurtherPart] = Field(default_factory=dict)


class EvaluationFile(Strict):
    """`evaluation.json`; older ones do not say what the last model is."""

    samples: Some
    tokens: Some
    before: ModelScores
    after: ModelScores
    kl: Number
    kl_se: Positive | None
    parts: dict[str, PartScores] = Field(default_factory=dict)
    generation: Generation | None
    device: str
    dtype: str
    last: Literal["cut", "patched", "healed"] | None = None
    cut: FurtherScores | None = None
    patched: FurtherScores | None = None
    unpatched: list[UnpatchedCut] = Field(default_factory=list)


class HealedPart(Perplexity):
    """The cut model on text held out, or on one part of it, before or after healing."""

    kl: Number
    kl_se: Positive | None
    original_perplexity: Positive


class HealedScores(HealedPart):
    """The same on all of it, and by part where it is a mixture."""

    parts: dict[str, HealedPart] = Field(default_factory=dict)


class PatchScores(Strict):
    """What the linear patch alone came to; no scores where nothing could be patched."""

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


class HealingRecipe(Strict):
    """What a healing's budget of tokens or of time bought."""

    steps: Some
    batch: Some
    length: Some
    learning_rate: Positive
    tokens: Count
    seconds: Positive | None
    epochs: Positive


class HealingCheck(Strict):
    """The KL to the original of each sample held out, summed, at a step of a training."""

    step: Count
    kl_sums: list[Number]


class HealingStop(Strict):
    """Why a training ended early, and of which step its weights are; None: of its last."""

    why: str
    kept: Count | None


class HealOptions(Strict):
    """The options of a healing."""

    __pydantic_extra__: dict[str, Scalar]
    patch: str
    method: str


class HealingFile(Strict):
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
    report_tokens: Count
    overlap: dict[str, Positive] = Field(default_factory=dict)
    options: HealOptions


class HealingWork(Strict):
    """`identity.json` of an unfinished healing: what it depends on."""

    work: str


class HealingCurve(Strict):
    """The training curve up to a saved state."""

    steps: list[Step]
    checks: list[HealingCheck]
    trained_parameters: Count


class HealingMemory(Strict):
    """How a training is computed on its machine."""

    most: Some
    recompute: bool


class HealedCandidate(Strict):
    """A candidate after a little healing."""

    removed: Blocks
    kl: Number
    kl_se: Positive | None
    perplexity: Positive


class ComparedCandidate(HealedCandidate):
    """The same beside its KL before healing and beside the best; older files say less."""

    kl_before: Number
    source: str = "spectrum"
    steps: Count = 0
    tokens: Count = 0
    seconds: Positive = 0.0
    dropped: str | None = None
    difference: Number | None = None
    difference_se: Positive | None = None


class HealedCandidates(Strict):
    """`healed-candidates.json`."""

    candidates: Annotated[list[ComparedCandidate], Field(min_length=1)]
    chosen: ComparedCandidate


class TaskRow(Strict):
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


class TextScores(Strict):
    """Both models on WikiText-2."""

    tokens: Count
    original: Perplexity
    cut: Perplexity
    kl: Number


class BenchmarksFile(Strict):
    """`benchmarks.json`."""

    rows: list[TaskRow]
    engine: str
    left_out: Count = 0
    wikitext2: TextScores | None = None


class KeptScores(Strict):
    """The scores of one model on one task, kept while the other is asked."""

    task: str
    metric: str
    values: Annotated[list[Number], Field(min_length=1)]
    questions: list[str]
    shots: Count
