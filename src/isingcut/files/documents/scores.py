"""Documents about models: evaluations, healings, benchmarks, and what is kept under way."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from isingcut.files.documents.states import (
    Blocks,
    Count,
    Document,
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

    prefill_tokens_per_second: Positive | None = None
    prefill_tokens_per_second_se: Positive | None = None
    decode_tokens_per_second: Positive | None = None
    decode_tokens_per_second_se: Positive | None = None
    parameters: Some
    bytes: Some
    blocks: Some
    peak_memory_bytes: Count | None = None


class Generation(Strict):
    """One text by both models."""

    prompt: str
    before: str
    after: str


class TextSize(Strict):
    """The size of a text."""

    samples: Some
    tokens: Some


class PairScores(Strict):
    """The original and another model on the same text."""

    before: Perplexity
    after: Perplexity
    kl: Number
    kl_se: Positive | None


class PartScores(PairScores, TextSize):
    """The same on one part of a mixture."""


class MixedScores(PairScores):
    """The same on all of the text, and by part where it is a mixture."""

    parts: dict[str, PartScores] = Field(default_factory=dict)


class FurtherPart(Perplexity):
    """A model between the original and the last one, on one part of a mixture."""

    kl: Number
    kl_se: Positive | None


class FurtherScores(FurtherPart):
    """The same on all of the text, and by part where it is a mixture."""

    parts: dict[str, FurtherPart] = Field(default_factory=dict)


class EvaluationFile(Document):
    """`evaluation.json`; older ones do not say what the last model is.

    Attributes:
        not_measured: keys of speed and memory that were left out.
        streamed: a model was read from disk block by block, and so has no speed.
    """

    kind: ClassVar = "evaluation"
    last: Literal["cut", "patched", "healed"] | None = None
    unpatched: list[UnpatchedCut] = Field(default_factory=list)
    cut: FurtherScores | None = None
    patched: FurtherScores | None = None
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
    threads: Some | None = None
    not_measured: list[str] = Field(default_factory=list)
    streamed: bool = False


class HealedPart(FurtherPart):
    """The cut model on text held out, or on one part of it, before or after healing."""

    original_perplexity: Positive


class HealedScores(HealedPart, Document):
    """The same on all of it, and by part where it is a mixture."""

    kind: ClassVar = "healing-before"
    parts: dict[str, HealedPart] = Field(default_factory=dict)


class PatchScores(Document):
    """What the linear patch alone came to; no scores where nothing could be patched."""

    kind: ClassVar = "healing-patched"
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


class HealingRecipe(Document):
    """What a healing's budget of tokens or of time bought."""

    kind: ClassVar = "healing-recipe"
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
    effort: str = ""
    length: Count | None = None


class HealingFile(Document):
    """`healing.json`."""

    kind: ClassVar = "healing"
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
    report_tokens: Count
    seconds: Positive = 0.0
    overlap: dict[str, Positive] = Field(default_factory=dict)
    options: HealOptions


class HealingWork(Document):
    """`identity.json` of an unfinished healing: what it depends on."""

    kind: ClassVar = "healing-work"
    work: str


class HealingCurve(Document):
    """The training curve up to a saved state."""

    kind: ClassVar = "healing-curve"
    steps: list[Step]
    checks: list[HealingCheck]
    trained_parameters: Count


class HealingMemory(Document):
    """How a training is computed on its machine."""

    kind: ClassVar = "healing-memory"
    most: Some
    recompute: bool


class AskedTask(Strict):
    """A benchmark task."""

    task: str
    metric: str
    shots: Count


class PairedScores(Strict):
    """Two models on the same questions.

    Attributes:
        original, cut: mean scores.
        difference: of the second to the first, with the ends of its 95 % interval.
        n: questions.
        p_value: of no difference, two-sided, by the test ``mcnemar`` or ``bootstrap``.
        more_than_noise: at the 5 % level, for this comparison alone.
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


class TaskRow(PairedScores, AskedTask):
    """The scores of both models on one benchmark task."""


class TextScores(Strict):
    """Both models on WikiText-2."""

    samples: Count = 0
    tokens: Count
    original: Perplexity
    cut: Perplexity
    kl: Number
    kl_se: Positive | None = None


class BenchmarksFile(Document):
    """`benchmarks.json`."""

    kind: ClassVar = "benchmarks"
    rows: list[TaskRow]
    engine: str
    left_out: Count = 0
    wikitext2: TextScores | None = None


class ReportFile(Document):
    """`report.json`, which nothing reads again."""

    kind: ClassVar = "report"
